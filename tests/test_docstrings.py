"""Docstrings name what is there: an attribute or an argument an entry, one at a time."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("d2ft_fl", "strategies", "clients")
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note|Notes):$")


def entries(docstring, section):
    """Names of the entries of a section of a docstring: what stands before ``: `` in its lines."""
    lines = docstring.expandtabs().split("\n")
    heads = [i for i, line in enumerate(lines) if line.strip() == f"{section}:"]
    if not heads:
        return []
    indent = len(lines[heads[0]]) - len(lines[heads[0]].lstrip())
    found = []
    for line in lines[heads[0] + 1 :]:
        deep = len(line) - len(line.lstrip())
        if line.strip() and deep <= indent:
            break
        if line.strip() and deep == indent + 4 and (entry := re.match(r"\s*([*\w, ]+): ", line)):
            found.append(entry[1].strip().lstrip("*"))
    return found


def members(node):
    """Names of the attributes and properties that a class declares or sets."""
    names = set()
    for item in ast.walk(node):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            names.add(item.target.id)
        elif isinstance(item, ast.Assign | ast.AnnAssign):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            names |= {n.attr for t in targets for n in ast.walk(t) if isinstance(n, ast.Attribute)}
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(item, ast.FunctionDef):
            names.add(item.name)
    return names


def arguments(node):
    """Names of a function's arguments; of a class those of its ``__init__``, or its fields."""
    if isinstance(node, ast.ClassDef):
        makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return arguments(makers[0]) if makers else members(node)
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return {argument.arg for argument in every}


def wrong_entries():
    """Entries that name nothing that is there, or several things at once."""
    for file in (f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or not ast.get_docstring(node):
                continue
            docstring = ast.get_docstring(node)
            known = {"Args": arguments(node)}
            if isinstance(node, ast.ClassDef):
                known["Attributes"] = members(node) | {
                    name for base in node.bases for name in inherited(base)
                }
            for section, names in known.items():
                for entry in entries(docstring, section):
                    if entry not in names and "*" not in str(names):
                        place = f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
                        yield f"{place}: {section} has {entry}"


def inherited(base):
    """Everything may be inherited of a base that is not looked up: entries are not judged then."""
    return {"*"} if ast.unparse(base) not in ("object", "Protocol") else set()


def test_entries_name_what_is_there_one_at_a_time():
    assert list(wrong_entries()) == []
