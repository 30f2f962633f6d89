"""What a launched instance does, as the script that cloud-init runs. Small enough to read before trusting it.

The order is the promise: the deadline is scheduled before anything that can hang, and the last line ends the instance, whatever
the lines between did (there is no ``set -e``). ``InstanceInitiatedShutdownBehavior=terminate`` makes power-off the end.
Everything that the job decides is in its spec in the lake; nothing secret stands here, since user data can be read by anyone
with DescribeInstanceAttribute.
"""

from __future__ import annotations

import shlex
from string import Template

_SCRIPT = Template("""\
#!/bin/bash
shutdown -h +$minutes
${login}docker pull $image
docker run --rm --gpus all --name crpbot-training --network host --stop-timeout 70 \\
  --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --pids-limit 2048 \\
  --log-driver awslogs --log-opt awslogs-region=$region --log-opt awslogs-group=$log_group --log-opt awslogs-stream=$log_stream \\
  --log-opt mode=non-blocking --log-opt max-buffer-size=4m \\
  -e AWS_DEFAULT_REGION=$region -e CRPBOT_LAKE=$lake -e CRPBOT_RUN=$run -e CRPBOT_GENERATION=$generation \\
  -e AWS_ENDPOINT_URL -e AWS_EC2_METADATA_SERVICE_ENDPOINT -e AWS_EC2_METADATA_DISABLED \\
  $image
shutdown -h now
""")


def render(
    *,
    run: str,
    generation: int,
    lake: str,
    image: str,
    region: str,
    log_group: str,
    log_stream: str,
    max_lifetime_minutes: int,
) -> str:
    """The script for one launch. The same arguments give the same text, so that its hash identifies it.

    The log driver does not block: by default a training would stand still while CloudWatch is away (Docker docs, "Configure logging
    drivers"). The stop timeout gives the job time for a checkpoint when the instance is shut down (Docker's own is 10 s); it takes
    a minute at the most. The image needs no capability and writes to /tmp alone; the limit on processes and threads is many times
    what an instance's cores ask for. Endpoints are passed through by name: set on a machine that has them (a local cloud), absent
    on AWS, where the job asks the instance's own metadata service for spot notices, one hop away on the host's network.
    """
    registry = image.partition("/")[0]
    login = ""
    if ".dkr.ecr." in registry:
        ecr_region = registry.split(".dkr.ecr.")[1].partition(".")[0]
        login = (
            f"aws ecr get-login-password --region {shlex.quote(ecr_region)}"
            f" | docker login --username AWS --password-stdin {shlex.quote(registry)}\n"
        )
    values = {
        "image": image,
        "region": region,
        "log_group": log_group,
        "log_stream": log_stream,
        "lake": lake,
        "run": run,
    }
    quoted = {name: shlex.quote(value) for name, value in values.items()}
    return _SCRIPT.substitute(quoted, minutes=int(max_lifetime_minutes), generation=int(generation), login=login)
