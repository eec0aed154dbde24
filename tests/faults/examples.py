"""How many examples a property is tried on: few in make test, and always the same; many others in make campaign."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("campaign", print_blob=True)
MORE = 4  # times as many


def examples(few: int, steps: int = 50) -> settings:
    """Settings for so many examples, with so many steps where they are sequences."""
    many = settings.get_current_profile_name() == "campaign"
    return settings(
        max_examples=few * MORE if many else few,
        stateful_step_count=steps * 2 if many else steps,
        derandomize=not many,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
