"""Instances are real: they boot, run their user data, ship logs, switch themselves off, and end with every process they started."""

from __future__ import annotations

import base64
import signal
import subprocess
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError

from crpbot_lib.sandbox.processes import alive

GROUP = "/crpbot/training"
RUN = (
    "docker run --rm --gpus all --name job --network host "
    "--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --pids-limit 2048"
)


def awslogs(stream: str) -> str:
    return (
        f"--log-driver awslogs --log-opt awslogs-region=us-east-1 --log-opt awslogs-group={GROUP} --log-opt awslogs-stream={stream}"
    )


def messages(cloud: Any, stream: str) -> list[str]:
    try:
        answer = cloud.logs.get_log_events(logGroupName=GROUP, logStreamName=stream, startFromHead=True)
    except cloud.logs.exceptions.ResourceNotFoundException:
        return []
    return [event["message"] for event in answer["events"]]


def test_an_instance_goes_from_pending_to_running_and_runs_its_user_data(cloud: Any) -> None:
    answer = cloud.run("#!/bin/bash\necho booted in $AWS_REGION with $#\n")
    instance = answer["Instances"][0]["InstanceId"]
    assert answer["Instances"][0]["State"] == {"Code": 0, "Name": "pending"}
    console = cloud.wait_for_console(instance, "the user data ended with 0")
    assert "booted in us-east-1 with 0" in console
    assert cloud.state(instance) == "running"
    output = cloud.ec2.get_console_output(InstanceId=instance)["Output"]
    assert "booted in us-east-1" in output
    cloud.ec2.terminate_instances(InstanceIds=[instance])


def test_termination_ends_every_process_before_the_instance_is_terminated(cloud: Any) -> None:
    script = f"#!/bin/bash\nwhile true; do sleep 0.1; done &\n{RUN} -e SECONDS=600 image &\necho started\nsleep 600\n"
    instance = cloud.launch(script)
    cloud.wait_for_console(instance, "lake None")
    pids = cloud.record(instance)["pids"]
    assert len(pids) >= 6  # root, first process, shell, loop, docker, job
    before = cloud.ec2.terminate_instances(InstanceIds=[instance])["TerminatingInstances"][0]
    assert before["PreviousState"]["Name"] == "running"
    assert before["CurrentState"]["Name"] == "shutting-down"
    assert cloud.state(instance) in ("shutting-down", "terminated")
    cloud.wait_for_state(instance, "terminated")
    assert [pid for pid in pids if alive(pid)] == []
    record = cloud.record(instance)
    assert [entry["state"] for entry in record["history"]] == ["pending", "running", "shutting-down", "terminated"]
    assert record["pids"] == []
    assert cloud.describe(instance)["StateReason"]["Code"] == "Client.UserInitiatedShutdown"
    assert cloud.describe(instance)["StateTransitionReason"].startswith("User initiated (20")


def test_a_process_that_ignores_sigterm_is_killed(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\ntrap '' TERM\necho deaf\nwhile true; do sleep 1; done\n")
    cloud.wait_for_console(instance, "deaf")
    pids = cloud.record(instance)["pids"]
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert [pid for pid in pids if alive(pid)] == []


def test_termination_while_pending_never_boots(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\necho booted\n")
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")
    assert "running" not in [entry["state"] for entry in cloud.record(instance)["history"]]
    assert cloud.console(instance) == ""


def test_terminating_twice_changes_nothing(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\n")
    for _ in range(2):
        cloud.ec2.terminate_instances(InstanceIds=[instance])
        cloud.wait_for_state(instance, "terminated")
    assert len(cloud.record(instance)["history"]) == 3


def test_power_off_terminates_and_says_that_the_instance_did_it(cloud: Any) -> None:
    for words in ("shutdown -h now", "poweroff"):
        instance = cloud.launch(f"#!/bin/bash\n{words}\nsleep 600\n")
        cloud.wait_for_state(instance, "terminated")
        described = cloud.describe(instance)
        assert described["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
        stamp = described["StateTransitionReason"].partition("(")[2].removesuffix(" GMT)")
        ended = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        assert abs((datetime.now(UTC) - ended).total_seconds()) < 30


def test_power_off_stops_where_that_is_the_behaviour_and_a_stopped_instance_can_be_terminated(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\nshutdown -h now\n", InstanceInitiatedShutdownBehavior="stop", InstanceMarketOptions={})
    cloud.wait_for_state(instance, "stopped")
    assert [entry["state"] for entry in cloud.record(instance)["history"]] == ["pending", "running", "stopping", "stopped"]
    with pytest.raises(ClientError, match="runs its user data once"):
        cloud.ec2.start_instances(InstanceIds=[instance])
    cloud.ec2.terminate_instances(InstanceIds=[instance])
    cloud.wait_for_state(instance, "terminated")


def test_the_deadline_switches_off_whatever_the_job_does(cloud: Any) -> None:
    started = time.monotonic()
    instance = cloud.launch(f"#!/bin/bash\nshutdown -h +4\n{RUN} -e SECONDS=600 image\n")  # 2 s
    cloud.wait_for_state(instance, "terminated")
    assert time.monotonic() - started >= 2
    assert "Shutdown scheduled for" in cloud.console(instance)


def test_a_later_schedule_replaces_an_earlier_one_and_c_cancels(cloud: Any) -> None:
    script = (
        # two seconds are time enough for the next command, however busy the machine is
        "#!/bin/bash\nshutdown -h +4\nshutdown -h +1000\nsleep 2.5\necho replaced\n"
        "shutdown -P +4\nshutdown -c\nsleep 2.5\necho cancelled\n"
    )
    instance = cloud.launch(script)
    console = cloud.finish(instance)
    assert "replaced" in console
    assert "cancelled" in console


def test_the_container_gets_what_was_passed_and_its_exit_code_comes_back(cloud: Any) -> None:
    script = (
        "#!/bin/bash\nsecret=1\nexport BY_NAME=b\n"
        f"{RUN} -e AWS_REGION=eu-west-1 -e AWS_ENDPOINT_URL -e BY_NAME -e NOT_SET -e CRPBOT_LAKE=s3://here"
        " -e EXIT=7 image:1 one two\n"
        "echo it ended with $?\n"
    )
    console = cloud.finish(cloud.launch(script))
    assert "it ended with 7" in console
    assert "arguments ['one', 'two']" in console
    assert "lake s3://here" in console
    names = next(line for line in console.splitlines() if line.startswith("environment"))
    for name in ("'AWS_REGION'", "'AWS_ENDPOINT_URL'", "'BY_NAME'", "'AWS_ACCESS_KEY_ID'", "'AWS_EC2_METADATA_DISABLED'"):
        assert name in names
    for name in ("NOT_SET", "secret", "VIRTUAL_ENV", "CRPBOT_COINBASE_URL"):
        assert name not in names


def test_output_reaches_cloudwatch_while_the_job_runs(cloud: Any) -> None:
    instance = cloud.launch(f"#!/bin/bash\n{RUN} {awslogs('live/001')} -e LINES=3 -e SECONDS=600 image\n")
    cloud.wait_for(lambda: "line 2" in messages(cloud, "live/001"))
    assert cloud.state(instance) == "running"
    assert messages(cloud, "live/001")[-3:] == ["line 0", "line 1", "line 2"]
    cloud.ec2.terminate_instances(InstanceIds=[instance])


def test_the_last_lines_reach_cloudwatch_before_docker_returns(cloud: Any) -> None:
    console = cloud.finish(cloud.launch(f"#!/bin/bash\n{RUN} {awslogs('short/001')} -e LINES=1 image\necho done\n"))
    assert "done" in console
    assert messages(cloud, "short/001")[-1] == "line 0"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("docker run -d image", "unknown flag: -d"),
        ("docker run --privileged image", "unknown flag: --privileged"),
        ("docker run --network bridge image", "network bridge not found"),
        ("docker run --read-only=no image", "unknown flag: --read-only"),
        ("docker run --security-opt no-new-privilege image", "knows `no-new-privileges`"),
        ("docker run --pids-limit many image", 'invalid argument "many" for "--pids-limit" flag'),
        ("docker run", "requires at least 1 argument"),
        ("docker build .", "does not know: docker build ."),
        ("docker run --log-driver awslogs --log-opt awslogs-group=/none image", "The specified log group does not exist: /none"),
        ("docker run --log-driver splunk image", "unknown log driver splunk"),
        ("aws s3 ls", "know `aws ecr get-login-password` only"),
        ("shutdown -r now", "not -r"),
        ("shutdown 23:00", "failed to parse time specification"),
    ],
)
def test_what_a_stand_in_does_not_know_it_refuses(cloud: Any, words: str, complaint: str) -> None:
    console = cloud.finish(cloud.launch(f"#!/bin/bash\n{words}\necho code $?\n"))
    assert complaint in console
    assert "code 0" not in console
    assert "arguments" not in console  # no job ran


def test_the_registry_login_works_and_there_is_no_gpu(cloud: Any) -> None:
    script = (
        "#!/bin/bash\naws ecr get-login-password --region us-east-1 | docker login --username AWS --password-stdin registry\n"
        "docker pull registry/image:1\nnvidia-smi\necho gpu $?\n"
    )
    console = cloud.finish(cloud.launch(script))
    assert "Login Succeeded" in console
    assert "NVIDIA-SMI has failed" in console
    assert "gpu 9" in console


def test_user_data_that_is_no_bash_script_is_not_run_and_the_console_says_so(cloud: Any) -> None:
    instance = cloud.launch("#cloud-config\npower_state: {mode: poweroff}\n")
    cloud.wait_for_console(instance, "its first line is '#cloud-config', so nothing is run")
    assert cloud.state(instance) == "running"  # and bills, as it would
    cloud.ec2.terminate_instances(InstanceIds=[instance])


def test_a_background_process_outlives_the_user_data_as_it_does_on_a_machine(cloud: Any) -> None:
    instance = cloud.launch("#!/bin/bash\n(sleep 2; echo still here) &\n")
    cloud.wait_for_console(instance, "the user data ended")
    cloud.wait_for_console(instance, "still here")
    cloud.ec2.terminate_instances(InstanceIds=[instance])


def test_user_data_arrives_unchanged(cloud: Any) -> None:
    script = "#!/bin/bash\necho 'ünïcode & \"quotes\" %41+'\n"
    instance = cloud.launch(script)
    kept = cloud.ec2.describe_instance_attribute(InstanceId=instance, Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(kept).decode() == script
    assert 'ünïcode & "quotes" %41+' in cloud.finish(instance)


# --- user data cannot reach the real machine ---------------------------------------------------------------------------------

# $canary is an executable file that leaves a trace where it is run; $victim a process of the test
ESCAPES = """#!/bin/bash
set +e
{canary}
/sbin/shutdown -k now
command -p shutdown -k now
command -p bash -c {canary}
exec {canary}
builtin exec {canary}
env {canary}
sudo {canary}
nohup {canary}
PATH={folder}:/sbin:/bin canary
export PATH=/sbin:/bin
declare -x PATH=/bin
printf -v PATH /bin
read -r PATH <<< /bin
unset PATH
f() {{ local PATH={folder}; canary; }}
f
hash -p {canary} canary
canary
BASH_CMDS[canary]={canary}
canary
shopt -s expand_aliases
alias canary={canary}
eval canary
set +r
set +o restricted
shopt -u restricted_shell
canary
. {canary}
source {canary}
enable -f {folder}/evil.so evil
enable -d kill
SHELL={canary}
BASH_ENV={canary}
ENV={canary}
export BASH_ENV ENV
nvidia-smi
bash {canary}
sh {canary}
python3 {canary}
perl {canary}
busybox {canary}
systemctl poweroff
reboot
halt
init 0
trap {canary} USR1
kill -USR1 $$
(exec -c {canary})
coproc {canary}
wait
echo trace > {trace}
echo trace >> {trace}
echo trace >| {trace}
history -s trace
history -w {trace}
history -w ../bin/docker
LD_PRELOAD={folder}/evil.so nvidia-smi
PYTHONPATH={folder} PYTHONSTARTUP={folder}/evil.py nvidia-smi
docker run image {canary}
kill -9 {victim}
for name in shutdown poweroff docker nvidia-smi aws sleep; do echo found $(type -P $name); done
echo PATH is $PATH
echo survived
"""


def test_user_data_cannot_reach_the_real_commands(cloud: Any, tmp_path: Any) -> None:
    trace, canary = tmp_path / "trace", tmp_path / "canary"
    canary.write_text(f"#!/bin/sh\necho ran > {trace}\n")
    canary.chmod(0o755)
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    (tmp_path / "sitecustomize.py").write_text(f"open({str(trace)!r}, 'w')\n")
    subprocess.run([str(canary)], check=True)
    assert trace.exists()  # the canary works, so that its silence below means something
    trace.unlink()
    victim = subprocess.Popen(["sleep", "600"])
    try:
        script = ESCAPES.format(canary=canary, folder=tmp_path, trace=trace, victim=victim.pid)
        instance = cloud.launch(script)
        console = cloud.finish(instance)
        assert "survived" in console
        assert not trace.exists()
        bin_folder = cloud.sandbox.options.state_dir / "instances" / instance / "bin"
        assert f"PATH is {bin_folder}" in console
        found = [line.removeprefix("found ") for line in console.splitlines() if line.startswith("found ")]
        assert found == [f"{bin_folder}/{name}" for name in ("shutdown", "poweroff", "docker", "nvidia-smi", "aws", "sleep")]
        assert sorted(p.name for p in bin_folder.iterdir()) == sorted(p.rpartition("/")[2] for p in found)
        # where the kernel grants a namespace, even the shell's own `kill` reaches nothing outside
        isolated = "running its user data, isolated" in console
        assert (victim.poll() is None) == isolated
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()


def test_options_of_the_first_line_are_honoured_and_others_refused(cloud: Any) -> None:
    console = cloud.finish(cloud.launch("#!/bin/bash -e\nnvidia-smi\necho never\n"))
    assert "the user data ended with 9" in console
    assert "never" not in console
    instance = cloud.launch("#!/bin/bash --norc +r\necho never\n")
    assert "never" not in cloud.wait_for_console(instance, "so nothing is run").replace("echo never", "")
    cloud.ec2.terminate_instances(InstanceIds=[instance])
