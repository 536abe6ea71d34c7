"""The admin pages of a running receiver, read as an operator's programs do."""

import re
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.receiving import Receiver, eventually


def admin_url(receiver: Receiver) -> str:
    address = ""

    def told() -> bool:
        nonlocal address
        found = re.search(r"health and metrics at (\S+)\n", receiver.err)
        address = found[1] if found else ""
        return bool(found)

    eventually(told, "the admin listener's address")
    return f"http://{address}"


def ready(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as response:  # noqa: S310
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def scrape(url: str) -> dict[str, float]:
    """Samples by name and labels; buckets left out."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:  # noqa: S310
        text = response.read().decode()
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
