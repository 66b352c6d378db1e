"""A seeded fuzzer: hostile artifacts, GGUF files, command lines and kernel calls.

Its rule: every input ends in a right result or in one sentence (and code 2); never in a traceback, a wrong result, a hang, a
crash, memory beyond twice the input and a constant, or a changed file. `make fuzz` runs it for long, tests/test_fuzz.py a short
stretch of it. A case is its kind, a seed and a number, and comes out the same every time:

    cd tests && python -m fuzz --kinds artifacts --seed 0 --case 17
"""
