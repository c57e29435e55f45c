"""A run to look at: one HTML page that needs nothing else, and a short Markdown report.

What is shown was said by models, judges and partners: it is data here, never markup. `source` reads, `text` makes texts
harmless, `page` and `report` write. Nothing here learns, plays or judges, or opens a network connection.
"""
