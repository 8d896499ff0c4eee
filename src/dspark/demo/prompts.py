"""The demo's prompts: beginnings of ordinary Python, written for it and in no training file."""

PROMPTS = (
    '''\
import os
import json


def load_settings(path, default=None):
    """Return the settings stored in the JSON file at path.

    If the file does not exist, return default.
    """
''',
    '''\
class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=None):
        self._items = list(items or [])

    def push(self, item):
        """Put an item on top."""
''',
    """\
import argparse


def main(argv=None):
    parser = argparse.ArgumentParser(description="Count the words of text files.")
    parser.add_argument("files", nargs="+", help="the files to read")
""",
    """\
import unittest

from inventory import Inventory


class InventoryTest(unittest.TestCase):

    def setUp(self):
        self.inventory = Inventory()

    def test_add_item(self):
""",
)
