"""What the project is compared with: plain functions that use nothing of spos_fast.

Each is written as somebody who cares for speed would write it with the tools named, in its best layout.
"""
