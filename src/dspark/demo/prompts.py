"""The demo's prompts: beginnings of ordinary Python, written for it and in no training file."""

PROMPTS = (
    """\
class Visitor:
    def visit_name(self, node):
        return node.name

    def visit_number(self, node):
        return node.value

    def visit_add(self, node):
        return self.visit(node.left) + self.visit(node.right)

    def visit_subtract(self, node):
""",
    """\
class Node:
    def __init__(self, value, left=None, right=None):
        self.value = value
        self.left = left
        self.right = right

    def __repr__(self):
        return f"Node({self.value!r}, {self.left!r}, {self.right!r})"

    def __eq__(self, other):
        if not isinstance(other, Node):
            return NotImplemented
""",
    """\
import unittest

from shop import Basket


class BasketTest(unittest.TestCase):

    def setUp(self):
        self.basket = Basket()

    def test_empty(self):
        self.assertEqual(self.basket.count(), 0)

    def test_add(self):
""",
    """\
import argparse


def main(argv=None):
    parser = argparse.ArgumentParser(description="Count the words of text files.")
    parser.add_argument("files", nargs="+", help="the files to read")
""",
)
