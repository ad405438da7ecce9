from d2ft_fl.util.toml_lines import Locator, line_numbers

TEXT = '''# a comment with [brackets] and a = 1

mix = [
  "a",  # [classes.b]
  "b",
]
"quoted key" = """
[classes.c]
flops = 3
"""

[classes.a]
flops = "40 %"
bytes.up = {share = 1}  # dotted
["classes" . 'b c']
memory = 1
[[many]]
x = 1
[many.inner]
y = 2
[[many]]
x = 3
[[many.more]]
[[many.more]]
z = 4
'''


def test_every_key_and_table_has_the_line_that_its_statement_starts_on():
    assert line_numbers(TEXT) == {
        ("mix",): 3,
        ("quoted key",): 7,
        ("classes",): 12,
        ("classes", "a"): 12,
        ("classes", "a", "flops"): 13,
        ("classes", "a", "bytes"): 14,
        ("classes", "a", "bytes", "up"): 14,
        ("classes", "a", "bytes", "up", "share"): 14,
        ("classes", "b c"): 15,
        ("classes", "b c", "memory"): 16,
        ("many",): 17,
        ("many", "0"): 17,
        ("many", "0", "x"): 18,
        ("many", "0", "inner"): 19,
        ("many", "0", "inner", "y"): 20,
        ("many", "1"): 21,
        ("many", "1", "x"): 22,
        ("many", "1", "more"): 23,
        ("many", "1", "more", "0"): 23,
        ("many", "1", "more", "1"): 24,
        ("many", "1", "more", "1", "z"): 25,
    }


def test_line_ends_of_other_systems_count_once():
    assert line_numbers(TEXT.replace("\n", "\r\n")) == line_numbers(TEXT)


def test_what_a_text_lacks_is_at_the_table_above_it_or_the_first_line():
    at = Locator("mine.toml", TEXT)
    assert at("classes", "a", "speed") == "mine.toml:12"
    assert at("absent") == "mine.toml:1"
