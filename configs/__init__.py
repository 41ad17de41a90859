"""One file a method: its parent plus what differs.

`base.py` alone introduces keys, `sizes.py` sets the sizes.
"""
