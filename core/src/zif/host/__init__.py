"""Parts for devices whose memory is the host's, in plain torch: vendors adopt, tune or replace them.

Core itself imports none of it. Of the modules, `facts`, `layout`, `packages` and `threads` import no array library.
"""
