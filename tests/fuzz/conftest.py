"""Every case is drawn from a fixed seed, and nothing is written into the checkout."""

import tempfile

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

HOME = tempfile.TemporaryDirectory(prefix="hypothesis-")
set_hypothesis_home_dir(HOME.name)
settings.register_profile(
    "fuzz", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)
settings.load_profile("fuzz")
