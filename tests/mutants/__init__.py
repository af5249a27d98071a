"""Mutation testing: seed small faults by rule, run the tests that could detect them, list the survivors.

    python -m tests.mutants las_fast/training/losses.py  judge every mutant of one file
    python -m tests.mutants las_fast --sample 200        judge a random sample, spread over the files
    python -m tests.mutants las_fast --list              list the mutants and judge none
    python -m tests.mutants las_fast --sample 200 --again --budget 60
                                                         judge survivors again, with more time for tests
    python -m tests.mutants --report build/mutants/results.jsonl

A mutant is one small edit of one file: `<` becomes `<=`, a keyword argument is dropped, a call is deleted. It is
noticed (detected) if a test fails or runs several times longer than usual. The working tree is never edited: a mutant
exists only in the memory of the process that judges it.

The report: "noticed" is the fraction of mutants that a test detected. A survivor means a missing test, dead code, or an
equivalent mutant, whose edit has no observable effect. Read each one. Write the test, or record the mutant in
judged.yaml with the reason. "noticed of live" excludes mutants recorded as equivalent or as run only on a GPU. A mutant
is judged by the tests that run the edited line, cheapest first, for at most --budget CPU seconds as recorded: a fault
that only a slower test detects counts as a survivor.

The first run records which test runs which line, and how many CPU seconds it takes (build/mutants/records, some
minutes); later runs record only test files that have changed. With --tests, only those are recorded and run, which is
faster; other tests might detect a survivor.

The parts:
    base.py      Mutant, Verdict and the Target protocol; one Target per language
    rules.py     the edits of Python code
    recorder.py  a pytest plugin: which test runs which line
    tests_of.py  which tests to run for a line, cheapest first
    server.py    a process that holds all tests and forks for each mutant
    python.py    the Target for las_fast/
    cpp*, triton.py  the Targets for csrc/ and kernels/
    __main__.py  options, sample, resume, report
"""
