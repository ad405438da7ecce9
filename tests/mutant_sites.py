"""Which parts of a module can be changed to make a mutant, and how."""

import ast

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"any": "all", "all": "any", "min": "max", "max": "min", "floor": "ceil", "ceil": "floor"}

SYMMETRIC = {"min", "max", "minimum", "maximum"}  # what they return does not depend on the order


class Sites(ast.NodeVisitor):
    """Collects what can be changed in a module: (function, statement, node, how).

    ``how`` changes the node in place; the visitor leaves out texts, annotations and assertions.
    """

    def __init__(self):
        self.found, self.scope, self.statement = [], [], None

    def add(self, node, how):
        """Note one possible change."""
        self.found.append((".".join(self.scope), self.statement, node, how))

    def visit_ClassDef(self, node):
        self._inside(node, node.body)

    def visit_FunctionDef(self, node):
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self._inside(node, node.body)

    def _inside(self, node, body):
        self.scope.append(node.name)
        self.statements(body)
        self.scope.pop()

    def visit_Module(self, node):
        self.statements(node.body)

    def statements(self, body):
        """Visit statements; those that only do something may be left out."""
        for statement in body:
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if text or isinstance(statement, (ast.Assert, ast.Import, ast.ImportFrom, ast.Raise)):
                continue
            self.statement = statement
            stores = isinstance(statement, ast.Assign) and all(
                isinstance(target, (ast.Subscript, ast.Attribute)) for target in statement.targets
            )
            if stores or isinstance(statement, (ast.Expr, ast.AugAssign, ast.Continue, ast.Break)):
                self.add(statement, "remove")
            self.visit(statement)

    def generic_visit(self, node):
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            if name in ("body", "orelse", "finalbody") and isinstance(value, list):
                self.statements(value)
            elif isinstance(value, list):
                for part in value:
                    if isinstance(part, ast.AST):
                        self.visit(part)
            elif isinstance(value, ast.AST):
                self.visit(value)

    def visit_If(self, node):
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self.generic_visit(node)

    def visit_JoinedStr(self, node):
        """Leave messages as they are."""

    def visit_BinOp(self, node):
        texts = [node.left, node.right]
        if type(node.op) in SWAPS and not any(map(_is_text, texts)):
            self.add(node, "operator")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.USub, ast.Not)):
            self.add(node, "operand")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        self.add(node, "operator")
        self.generic_visit(node)

    def visit_Compare(self, node):
        if type(node.ops[0]) in SWAPS:
            self.add(node, "compare")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.add(node, "negate")
        elif isinstance(node.value, (int, float)):
            self.add(node, "more")
            self.add(node, "less")

    def visit_Call(self, node):
        plain = [a for a in node.args if not isinstance(a, ast.Starred)]
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if len(plain) == len(node.args) > 1 and name not in SYMMETRIC and not _same(*plain[:2]):
            self.add(node, "swap")
        if name in NAMES:
            self.add(node, "name")
        self.generic_visit(node)


def _same(one, other) -> bool:
    return ast.dump(one) == ast.dump(other)


def _is_text(node) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def change(node, how):
    if how == "remove":
        return ast.copy_location(ast.Pass(), node)
    if how == "operand":
        return node.operand
    if how == "operator":
        node.op = SWAPS[type(node.op)]()
    elif how == "compare":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif how == "negate":
        node.value = not node.value
    elif how in ("more", "less"):
        node.value += 1 if how == "more" else -1
    elif how == "swap":
        node.args[0], node.args[1] = node.args[1], node.args[0]
    elif how == "name":
        old = node.func
        if isinstance(old, ast.Name):
            old.id = NAMES[old.id]
        else:
            old.attr = NAMES[old.attr]
    return node
