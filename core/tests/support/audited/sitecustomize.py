"""Python imports this in every process that tests start, because its folder is on PYTHONPATH."""

import code_audit

code_audit.install()
