# The last line of every batch script sources this:  source after.sh STATUS COMMAND...
# STATUS is srun's. Of a job that did not end well, COMMAND decides whether SLURM is to start it again, and it is here,
# outside of any container, that SLURM is told so: the same job, with the same id, so that its dependents go on waiting.
unset "${!SINFO_@}" "${!SCONTROL_@}" # a person's habits
status=$1
shift
((status == 0)) && exit 0
job=$SLURM_JOB_ID
[[ -n ${SLURM_ARRAY_JOB_ID:-} ]] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
state=$(scontrol --oneliner show job "$job" | sed -n 's/.* JobState=\([A-Z_]*\) .*/\1/p')
if [[ $state != RUNNING ]]; then # cancelled, out of time, or requeued already
    exit "$status"
fi
nodes=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T %P')
if excluded=$("$@" --nodes="$nodes"); then
    trap '' TERM # the requeued job is ended; ExcNodeList is for one that waits
    scontrol requeue "$job" && [[ -n $excluded ]] && scontrol update JobId="$job" ExcNodeList="$excluded"
fi
exit "$status"
