"""Attacks on the package: processes killed at every change of a file, damaged files, full disks, hostile input.

Every attack is counted as clean or bad; a bad one is kept with what happened. The default test run tries a small part
with a fixed seed, the tests marked slow try the rest, and ``benchmarks/reliability.py`` writes the table.
"""
