"""The life of a GPU instance: launched once per generation, watched, and always terminated. Knows nothing of what it computes.

``launch`` makes the one instance of a run, ``watch`` follows it, ``terminate`` ends it by tag, ``reap`` ends what was left over,
``cost`` says what it came to. Every function takes its AWS client, its clock and its sleep, so that each can be tested alone.
"""
