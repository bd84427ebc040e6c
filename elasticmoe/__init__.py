"""The import root: `elasticmoe.common`, `elasticmoe.services`, `elasticmoe.native`, `elasticmoe.cli`.

The folders stand at the top of the repository; here are links to them (docs/adr/0023-one-import-root.md).
"""
