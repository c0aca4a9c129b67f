"""The verbs of `asvr`, a module for each kind of them; `pipeline.cli` lists the modules.

A module has one `app`, whose commands become verbs of `asvr`. What costs something is imported inside the functions.
"""
