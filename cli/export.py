"""placeholder until merged"""


def export(path: str) -> None:
    """x"""
