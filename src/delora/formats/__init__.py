"""Adapters as files.

===============  =====================================================================================
``files``        what all share: atomic writes, reads that never unpickle and that say what is wrong
``native``       our own folders: `delora.save`, `delora.load`
``peft``         Hugging Face PEFT's: `delora.export.peft`; read by `delora.load`
``diffusers``    those of image programs: `delora.export.diffusers`
===============  =====================================================================================
"""
