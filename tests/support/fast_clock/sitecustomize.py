"""A faster clock for the scripts that tests run: every wait, of theirs and of the libraries, is 50 times shorter."""

import time

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(seconds / 50)
