"""Laws of the library on every architecture that is at hand, tiny, random, without a download.

    python -m tests.zoo --built --processes 2   every type that docs/zoo.md lists as built; ends with 0 only if nothing is wrong
    python -m tests.zoo --all --processes 2     the others too
    python -m tests.zoo bert mamba wavlm        some of them

``configs.py`` makes a small configuration of a type, ``inputs.py`` finds inputs that a model runs with, ``build.py`` joins
the two into a model and its inputs, ``laws.py`` says what has to hold of it, ``census.py`` runs many types in processes and
counts, ``test_zoo.py`` runs a dozen of types with all other tests.
"""
