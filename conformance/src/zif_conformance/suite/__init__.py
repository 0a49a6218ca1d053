"""The tests of the suite, one file per level and subject: `test_l3_attention.py` holds `L3.attention.<test>`.

Collected by pytest; nothing imports these modules.
"""
