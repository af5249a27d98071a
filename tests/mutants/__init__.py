"""Mutation testing: seed small faults by rule, run the tests that could notice them, list what nobody noticed.

    python -m tests.mutants las_fast/training/losses.py           judge every mutant of one file
    python -m tests.mutants las_fast --sample 200        judge a random sample, spread over the files
    python -m tests.mutants las_fast --list              list the mutants and judge none
    python -m tests.mutants las_fast --sample 200 --again --budget 60
                                                         judge its survivors again, with more time for tests
    python -m tests.mutants --report build/mutants/results.jsonl

A mutant is one small edit of one file: `<` becomes `<=`, a keyword argument is dropped, a call is deleted. It is
noticed if a test fails, or runs several times longer than it should. The tree is never edited: a mutant lives in the
memory of the process that judges it.

How to read the report. "noticed" is the share of mutants that a test noticed. A survivor is a missing test, dead code,
or an equivalent mutant: an edit that changes nothing anybody could see. Read each one. Write the test, or record the
mutant in judged.yaml with the reason; "of live" leaves out those that are recorded as equivalent, or as what only a
GPU runs. A test takes part in judging a mutant if it runs the edited line, and the cheapest come first, until they have
taken --budget seconds: a fault that only a slower test would notice counts as a survivor.

The first run records which test runs which line (build/mutants/records, some minutes); later ones record only the files
of tests that have changed.

The parts:
    base.py      Mutant, Verdict, and what a Target must do; one Target per language
    rules.py     the edits that are made to Python code
    recorder.py  a pytest plugin: which test runs which line
    tests_of.py  which tests to run for a line, cheapest first
    server.py    a process that holds all tests, and forks for each mutant
    python.py    the Target for las_fast/
    cpp*, triton.py  those for csrc/ and kernels/
    __main__.py  options, sample, resume, report
"""
