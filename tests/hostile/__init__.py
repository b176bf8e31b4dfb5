"""Hostile inputs for every command: programs that make them, and a runner that checks each command's exit code.

An area is a module of this folder with a function `cases(kit, dice)`. The function yields `Case`s: a name, a function
that makes files in an empty folder, the command line to run there, and the exit codes that are right (2 by default).
`kit` has small valid things to spoil (a teacher's folder, its GGUF file, texts). `dice` is the only source of chance,
so a seed gives the same cases again. Modules are found automatically: to add an area, add a file.

    python -m tests.hostile                          # every case, with counts by area and command
    python -m tests.hostile --area gguf --seed 7     # other cases of one area
    python -m tests.hostile --area gguf --case NAME --keep DIR   # one case, whose files stay
"""
