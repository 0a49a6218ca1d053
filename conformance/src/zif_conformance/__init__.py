"""The conformance suite of the plugin contract: tests, gates, the run that survives what it tests, and its report.

Called by `zif conform`, and by pytest through the plugin in `zif_conformance.plugin`. Core never imports it.
"""
