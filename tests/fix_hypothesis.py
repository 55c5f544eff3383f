"""Settings of hypothesis for all tests: no deadline, because other work shares the machine."""

from hypothesis import settings

settings.register_profile("pbkfs", deadline=None)
settings.load_profile("pbkfs")
