"""The studies behind the pages in paper/docs: what is run, by which rule it is judged, how it is drawn.

===============  ==================================================================================
``engine``       runs the missing runs of a study on all cores; reads kept rows
``digits``       all studies on turned digits
``sentences``    robustness, starts and lam on rated sentences
``chat``         robustness of a small chat model
``critics``      the methods of Table 4 on critics' sentences, and on whole reviews
``dialogs``      reach and rate of a chat model on conversations
``headlines``    what `delora finetune` begins with, on a table that chose none of it
``fashion``      subjects and label maps with the small text-to-image model
``verdicts``     the claims, and the rules that judge them; pure functions of rows
``claims``       writes ``docs/claims.md``
``starts``       writes ``docs/starts.md``
``standins``     keeps the results of the stand-ins' recipes; writes ``docs/standins.md``
``reach``        the grids of the studies of reach; ``knobs``: their rules; ``strengths`` writes ``docs/reach.md``
``figures``      draws ``docs/figures``
===============  ==================================================================================

``digits``, ``sentences``, ``chat``, ``critics``, ``dialogs``, ``headlines`` and ``fashion`` are commands: ``python -m
paper.studies.digits [STUDY ...]`` runs what is missing of the named studies and appends rows to
``paper/results/digits/STUDY.jsonl``.
"""
