"""The paper's figures (arXiv 2603.06138) on the embedded model, or on any other, with intervals.

- ``plans``: which runs a figure needs; figures 2, 3 and 4 need the same ones.
- ``cell``: one run in a process of its own, and what is measured on it besides its cells.
- ``numbers``: cells -> what is plotted.
- ``figures``: pictures. ``tables``: Markdown and CSV.
"""
