import json

import pytest

from d2ft_fl.report.charts import (
    MOST_LINES,
    Chart,
    Choice,
    Entry,
    Option,
    blank,
    json_script,
    look,
    templates,
)


def chart(**changes):
    figure = blank(100, xaxis_title_text="round")
    figure.add_scatter(x=[1, 2], y=[0.5, float("nan")])
    return Chart(**{"name": "one", "label": "A <line>", "figure": figure, **changes})


def test_json_of_a_page_ends_no_element_and_knows_no_nan():
    text = json_script({"a": "</script><!--", "b": float("nan")}, "x")
    assert text.startswith('<script type="application/json" id=x>')
    assert text.count("<") == 2
    inside = text[text.index(">") + 1 : text.rindex("<")]
    assert json.loads(inside) == {"a": "</script><!--", "b": None}


def test_a_chart_is_described_for_who_cannot_see_it():
    assert 'role="img" aria-label="A &lt;line&gt;"' in chart().html()


def test_choices_are_inputs_with_names():
    options = [Option("rounds", note="of rounds"), Option("FLOPs", note="of work")]
    html = chart(choices=[Choice("over", options, 1)]).html()
    assert "<legend>over</legend>" in html
    assert html.count('type="radio"') == 2
    assert 'value="1" checked>' in html
    assert '<p class="note says">of work</p>' in html


def test_a_slider_says_where_it_is():
    options = [Option(f"round {n} of 3") for n in (1, 2, 3)]
    html = chart(choices=[Choice("round", options, 2, slider=True)]).html()
    assert 'type="range" min="0" max="2" value="2"' in html
    assert 'aria-label="round" aria-valuetext="round 3 of 3"' in html


def test_one_option_is_no_choice():
    assert " hidden>" in chart(choices=[Choice("over", [Option("rounds")])]).html()


def test_a_legend_switches_traces():
    html = chart(legend=[Entry("a & b", "#000", "dash", (0, 1), shown=False)]).html()
    assert '<input type="checkbox" data-traces="0 1">' in html
    assert "a &amp; b" in html


def test_lines_look_different():
    assert len({look(index)[:2] for index in range(MOST_LINES)}) == MOST_LINES
    for index in range(MOST_LINES - 1):
        assert all(a != b for a, b in zip(look(index), look(index + 1), strict=True))


@pytest.mark.parametrize("path", [("font", "color"), ("xaxis", "gridcolor"), ("coloraxis",)])
def test_themes_differ_in_their_colours(path):
    light, dark = (templates()[theme]["layout"] for theme in ("light", "dark"))
    for key in path:
        light, dark = light[key], dark[key]
    assert light != dark


def test_the_name_of_a_chart_is_text():
    """It may come from a key of somebody else's sweep."""
    assert "<img" not in chart(name='x"><img src=q onerror=alert(1)>').html()
