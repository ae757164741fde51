"""`clicktrainer doctor`: is this machine fit to train? A line for each check, with a remedy where it fails.

Nothing here takes another's word or waits for ever: each check has a time limit, and what may crash or hang (torch with a
wrong driver, a collective) runs in processes of its own, which are killed.
"""
