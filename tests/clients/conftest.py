"""The summary of `pytest -m clients`: which client was there, and what each answered."""

import collections


def pytest_terminal_summary(terminalreporter):
    """Prints the table of docs/huggingface.md from the properties of the tests."""
    versions = {}
    table = collections.defaultdict(dict)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == "client":
                    client, version, option, found = value
                    versions[client] = version or versions.get(client)
                    table[option][client] = found
    if not versions:
        return
    columns = list(versions)
    terminalreporter.section("clients")
    for client, version in versions.items():
        terminalreporter.line(f"{client}: {version}")
    terminalreporter.line(" | ".join(["option", *columns]))
    for option, found in table.items():
        cells = [found.get(client, "") for client in columns]
        terminalreporter.line(" | ".join([option, *cells]))
