"""``python -m crpbot_lib.sandbox.paced SECONDS``: the training container's entry point, slow while its run is held at ``step``.

A smoke run's training is over in seconds. Held (``holds``), each of its steps takes SECONDS longer; in all else it is the real
job: heartbeats, checkpoints, notices, signals.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request

_METADATA = "AWS_EC2_METADATA_SERVICE_ENDPOINT"


def main() -> int:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from crpbot_lib.training import __main__ as training

    # what is left is the job's own command line
    seconds = float(sys.argv.pop(1))
    # the address of this instance's metadata service names the instance
    question = urllib.request.Request(
        os.environ[_METADATA].replace("/metadata/", "/instances/") + "/held",
        data=json.dumps({"at": "step"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def slow(*_: object) -> None:
        with ask(question, timeout=10) as response:
            held = json.load(response)["held"]
        if held:
            time.sleep(seconds)

    register_optimizer_step_pre_hook(slow)
    return training.main()


if __name__ == "__main__":
    sys.exit(main())
