"""Hostile inputs for every command: programs that make them, and a runner that holds each to its exit code.

An area is a module of this folder with a function `cases(kit, dice)`. It yields `Case`s: a name, a function that makes
files in an empty folder, the command line to run there, and the exit codes that are right (2 where nothing is said).
`kit` has small valid things to spoil (a teacher's folder, its GGUF file, texts), and `dice` all the chance there is, so
that a seed gives the same cases again. Modules are found by themselves: to add an area, add a file.

    python -m tests.hostile                          # every case, with counts by area and command
    python -m tests.hostile --area gguf --seed 7     # other cases of one area
    python -m tests.hostile --area gguf --case NAME --keep DIR   # one case, whose files stay
"""
