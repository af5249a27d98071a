"""Everything to prove and measure on a GPU, in one command for a machine that has nothing but torch, Triton and pytest.

    python -m benchmarks.device --out FOLDER

Each part is a process of its own with a limit of its own. It appends each row to FOLDER/rows.csv as it is measured.
"""
