#!/usr/bin/env bash
# The one door. Makes its own environment in .venv, then trains, repeats, tests or measures; run again, it continues.
set -euo pipefail
path_of_caller=${PYTHONPATH:-}
unset CDPATH PYTHONHOME PYTHONPATH PYTHONSAFEPATH
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage() {
    cat <<'EOF'
Usage: bash reproduce.sh [COMMAND [ARGUMENT ...]]

  demo              train the embedded recipe and write its report (also what happens without a command)
  again [RECIPE]    train RECIPE (demo) a second time and compare metrics and weights byte by byte
  s23dr             train the published recipe on the hub's sets: needs a network and should have a GPU
  test              lint, types, tests and the offline analysis of the kernels
  bench             measure operators and training steps against their peers
  gpu               test and measure on this machine's GPU with its own PyTorch: no network, nothing is installed
  doctor            say what this machine has and what holds here
  help              this text

Arguments are handed on: `bash reproduce.sh demo --name four --seed 4`. Interrupted training continues when it is run again.
REPRODUCE_PYTHON=/path/to/python chooses the interpreter; otherwise python3.12, python3.11 and python3 are tried.
EOF
}

fail() {
    printf 'reproduce.sh: %s\n' "$@" >&2
    exit 1
}

candidates=(python3.12 python3.11 python3)
if [[ -n ${REPRODUCE_PYTHON:-} ]]; then candidates=("$REPRODUCE_PYTHON"); fi

# find_python PROBE CANDIDATE...: print the first candidate that runs PROBE, or say what was tried and fail.
# Candidates are run because a name on the path may be a shim with no interpreter behind it.
find_python() {
    local probe=$1 candidate answer tried=()
    shift
    for candidate in "$@"; do
        if answer=$("$candidate" -c "$probe" 2>&1); then
            printf '%s\n' "$candidate"
            return
        fi
        answer=${answer%%$'\n'*}
        tried+=("tried $candidate: ${answer##*: }")
    done
    fail "no suitable Python" "${tried[@]}"
}

can_make_environment='
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 13):
    sys.exit("is %d.%d, must be 3.11 or 3.12" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("is %d.%d without the module %s" % (*sys.version_info[:2], error.name))
'

can_reach_a_gpu='
import sys
try:
    import numpy, pytest, torch, triton
except ImportError as error:
    sys.exit("is %d.%d without the module %s" % (*sys.version_info[:2], error.name))
if not torch.cuda.is_available():
    sys.exit("its torch %s sees no CUDA device" % torch.__version__)
'

name_of_recipe='
import sys
from train.config import load_recipe
print(load_recipe(sys.argv[1]).name)
'

# The stamp is written last and names what .venv was made from: no stamp, or another one, and it is made anew.
is_made() {
    [[ -f .venv/reproduce.stamp && $(<.venv/reproduce.stamp) == "$1 "*"${REPRODUCE_PYTHON:-}" ]] &&
        .venv/bin/python -c '' 2>/dev/null
}

# One process makes .venv, while none uses it. Descriptor 9 stays open in all that is run then: as long as a command
# runs, .venv is not emptied under it. Without flock, or where no file can be locked, nothing is waited for.
make_environment() {
    local key told=
    key=$(cat constraints.txt setup.py | sha256sum)
    key=${key%% *}
    if ! { [[ -w . ]] && exec 9<>.venv.lock && flock -u 9; } 2>/dev/null; then
        flock() { true; }
    fi
    until
        flock -n -s 9 || {
            echo "another process is making .venv: waiting" >&2
            flock -s 9
        }
        is_made "$key"
    do
        if flock -n -x 9; then
            install_pins "$key"
            flock -s 9
            return
        fi
        [[ -n $told ]] || echo "another process uses .venv, which must be made anew: waiting for its end" >&2
        told=yes
        sleep 1
    done
}

# install_pins KEY: make .venv anew and stamp it.
install_pins() {
    local base
    # venv would empty the directory that a link leads to
    [[ ! -L .venv ]] || fail ".venv must be a directory of this checkout, it is a link: remove it"
    [[ $(uname -sm) == "Linux x86_64" ]] || fail "supported is Linux on x86-64, this is $(uname -sm)"
    base=$(find_python "$can_make_environment" "${candidates[@]}") ||
        fail "install Python 3.11 or 3.12 with its venv module (Debian, Ubuntu: apt install python3-venv)," \
            "or name one: REPRODUCE_PYTHON=/path/to/python bash reproduce.sh"
    echo "making .venv with $base, once: downloads PyTorch and what the tests need; minutes, and 3.2 GB of disk" >&2
    "$base" -m venv --clear .venv || fail "could not make .venv with $base"
    .venv/bin/python -m pip install --quiet --requirement constraints.txt ||
        fail "could not install constraints.txt into .venv; run again once the cause above is gone"
    printf '%s %s\n' "$1" "$base" >.venv/reproduce.stamp
}

# last_of FLAG DEFAULT ARGUMENT...: what the last FLAG among the arguments says, as the program takes it.
last_of() {
    local flag=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
        "$flag") value=${2:-} ;;
        "$flag"=*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

command=${1:-demo}
shift $(($# > 0))
case $command in
demo | s23dr)
    make_environment
    .venv/bin/python -m train run --recipe "$command" "$@"
    ;;
again)
    recipe=demo
    if [[ ${1:--} != -* ]]; then
        recipe=$1
        shift
    fi
    make_environment
    .venv/bin/python -m train run --recipe "$recipe" "$@"
    name=$(last_of --name "" "$@") runs=$(last_of --runs runs "$@")
    # by itself a run has the name of its recipe, which of a file is the one in it, or that of the file
    [[ -n $name ]] || name=$(.venv/bin/python -c "$name_of_recipe" "$(last_of --recipe "$recipe" "$@")")
    .venv/bin/python -m train run --recipe "$recipe" "$@" --name "$name-again"
    .venv/bin/python -m train compare "$runs/$name" "$runs/$name-again"
    ;;
test)
    make_environment
    # ruff and the type checker are tests too: tests/test_layout.py
    OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 "$@"
    env -u TRITON_INTERPRET .venv/bin/python -m bench.static --check
    env -u TRITON_INTERPRET .venv/bin/python -m bench.static step --arch 90 --check
    ;;
bench)
    make_environment
    .venv/bin/python -m bench "$@"
    ;;
gpu)
    # the PyTorch that knows this GPU may be a user's own, and so may what it is compared with
    unset PYTHONNOUSERSITE
    if [[ -n $path_of_caller ]]; then export PYTHONPATH=$path_of_caller; fi
    python=$(find_python "$can_reach_a_gpu" "${candidates[@]}") || {
        echo "reproduce.sh: gpu needs an NVIDIA GPU and a Python whose torch sees it; REPRODUCE_PYTHON names one" >&2
        exit 2
    }
    "$python" -m bench.gpu "$@"
    ;;
doctor)
    make_environment
    .venv/bin/python -m train.doctor "$@"
    ;;
help | -h | --help)
    usage
    ;;
*)
    echo "reproduce.sh: unknown command '$command'" >&2
    usage >&2
    exit 2
    ;;
esac
