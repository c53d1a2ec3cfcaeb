import pytest

from data_pipeline.errors import UsageError
from launcher.ranks import expand_tasks, first_node, join, slurm_step

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[003-004,17]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


def test_ranks_of_torchrun_or_the_local_executor_are_joined(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    with pytest.raises(UsageError, match=r"^environment: rank 3 of 4 without MASTER_PORT; start it with torchrun or"):
        join()
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert join() == (3, 4)


def test_alone_there_is_nothing_to_join():
    assert join() is None


def test_a_task_of_a_slurm_step_gets_torchs_environment():
    environment = slurm_step(STEP)
    port = int(environment.pop("MASTER_PORT"))
    assert environment == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu003",
    }
    assert 10_000 <= port < 30_000  # below the ports that the kernel hands out
    assert slurm_step({**STEP, "SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    assert slurm_step({**STEP, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != str(port)


def test_a_batch_shell_and_a_step_of_one_task_are_no_ranks():
    assert slurm_step({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8"}) is None
    assert slurm_step({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("gpu[01-04]", "gpu01"), ("r[2,4]n[1-3],x", "r2n1"), ("n-[7]-ib,x", "n-7-ib")],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_tasks_of_each_node():
    assert expand_tasks("8") == [8]
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
