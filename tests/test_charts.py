"""Charts are SVG that any viewer reads: deterministic, with every value, inside the picture, well-formed."""

import xml.etree.ElementTree as ET

import pytest

from bench.charts import BLUE, GREY, ORANGE, Bar, Point, ratio_chart, scaling_chart

BARS = [("g <1>", [Bar("slow & sure", 4.0, False), Bar("quick", 0.5, False), Bar("equal", 1.01, True)])]
CURVES = [
    ("batch", {"ours": [Point(8, 0.02, 0.001), Point(1, 0.01, 0.03)], "peer": [Point(1, 0.5, 0.0)]}),
    ("size", {"ours": [Point(64, 1.0, 0.1)]}),
]


def shapes(svg: str, tag: str) -> list[dict[str, str]]:
    return [element.attrib for element in ET.fromstring(svg) if element.tag.endswith("}" + tag)]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg) if element.tag.endswith("}text")]


@pytest.mark.parametrize("draw", [lambda: ratio_chart("t", BARS), lambda: scaling_chart("t", CURVES)])
def test_equal_numbers_give_equal_bytes_within_the_picture(draw):
    svg = draw()
    assert svg == draw()
    assert "nan" not in svg and "inf" not in svg
    root = ET.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for tag, names in {"rect": ("x", "y"), "circle": ("cx", "cy"), "text": ("x", "y")}.items():
        for shape in shapes(svg, tag):
            x, y = (float(shape.get(name, 0)) for name in names)
            assert 0 <= x <= width and 0 <= y <= height


def test_a_bar_goes_from_one_to_its_ratio_in_the_colour_of_its_verdict():
    svg = ratio_chart("t", BARS)
    slow, quick, equal = (bar for bar in shapes(svg, "rect") if bar.get("height") == "13")
    assert (slow["fill"], quick["fill"], equal["fill"]) == (BLUE, ORANGE, GREY)
    # four times to the right of 1 is twice as far as half to the left
    assert float(slow["width"]) == pytest.approx(2 * float(quick["width"]), abs=0.2)
    assert float(slow["x"]) == pytest.approx(float(quick["x"]) + float(quick["width"]), abs=0.2)
    assert {"g <1>", "slow & sure", "4.00", "0.50", "1.01", "1×"} <= set(texts(svg))


def test_a_curve_runs_through_its_points_by_size():
    svg = scaling_chart("t", CURVES)
    assert len(shapes(svg, "circle")) == 4
    first = [tuple(map(float, point.split(","))) for point in shapes(svg, "polyline")[0]["points"].split()]
    assert first[0][0] < first[1][0] and first[0][1] > first[1][1]
    assert {"batch", "size", "ours", "peer", "1", "8", "64"} <= set(texts(svg))


def test_charts_without_values_are_refused():
    with pytest.raises(ValueError, match="groups must hold at least one bar"):
        ratio_chart("t", [("g", [])])
    for panels in ([], [("batch", {"ours": []})]):
        with pytest.raises(ValueError, match="panels must hold at least one point"):
            scaling_chart("t", panels)


def test_the_key_names_the_colours_that_are_drawn_and_axes_say_that_they_are_logarithmic():
    one_sided = ratio_chart("t", [("g", [Bar("slow", 4.0, False)])])
    assert "ours is faster" in texts(one_sided) and not {"ours is slower", "inside the spread"} & set(texts(one_sided))
    assert {"ours is faster", "ours is slower", "inside the spread"} <= set(texts(ratio_chart("t", BARS)))
    for svg in (one_sided, scaling_chart("t", CURVES)):
        assert any("logarithmic" in text for text in texts(svg))


def test_a_ratio_of_wall_times_and_a_remark_are_told():
    assert "13.20 (wall)" in texts(ratio_chart("t", [("g", [Bar("slow", 13.2, False, True)])]))
    assert "not swept" in texts(scaling_chart("t", CURVES, "not swept"))
