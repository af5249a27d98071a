"""One command that runs every proof and measurement that needs a GPU, on a machine without pip, git or audio packages.

    python -m benchmarks.device --out FOLDER

Each part is a process with its own time limit. It appends rows to FOLDER/rows.csv as it measures them.
"""
