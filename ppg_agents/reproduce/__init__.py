"""The paper's figures (arXiv 2603.06138), drawn from runs of the embedded model or any other, with intervals.

- ``plans``: which runs a figure needs; figures 2 to 5 share theirs.
- ``cell``: one run in a process of its own, and the further measurements on it.
- ``numbers``: cells -> what is plotted.
- ``figures``: pictures. ``tables``: Markdown and CSV.
"""
