"""Shows a run: one self-contained HTML page, and a short Markdown report.

Text from models, judges and partners is data here, never markup. `source` reads it, `text` makes it harmless, `page`
and `report` write it. Nothing here learns, plays or judges, or opens a network connection.
"""
