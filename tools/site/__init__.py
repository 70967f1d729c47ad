"""The documentation site: what nbdev processes, shown by Quarto where it is installed and by our own renderer elsewhere.

These are build tools. They import nbdev, which the package never does, so they live outside it.
"""
