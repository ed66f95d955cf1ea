from setuptools import setup

setup(
    name="ridgeline",
    version="0.1.0",
    description="Roof wireframes from point clouds, bit for bit the same each time they are trained",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=["kernels", "perceiver", "train", "bench"],
    package_data={"train": ["report_page.html"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10",
        "numpy>=2",
        "datasets>=4",
        "safetensors",
        "scipy",
        "tqdm",
        "tyro",
    ],
    extras_require={
        "eval": ["hoho2025"],
        "viz": ["plotly>=6"],
        "peers": ["geomloss", "POT"],
        # needs CUDA, so it is no part of the pinned environment
        "gpu-peers": ["flash-sinkhorn==0.4.1"],
        "dev": ["pytest>=8", "pytest-xdist", "pytest-benchmark", "ruff", "basedpyright"],
    },
)
