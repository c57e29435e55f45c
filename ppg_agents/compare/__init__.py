"""Which policy wins: agents × policy classes × domains × sample sizes × seeds, with error bars.

- ``plan``: one TOML file -> cells, and the runs that fill them.
- ``cell``: one run, in a process of its own.
- ``engine``: many runs at a time, on this machine or on Ray.
- ``statistics``: intervals, paired differences, corrected p-values.
- ``report``: CSV, Markdown, a picture.
"""
