set +e
told= next= requeue=
trap 'told=yes' TERM # SLURM ends the job and tells the ranks as well: stay to see how they end
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of whoever submitted the job
restarts=$((${SLURM_RESTART_COUNT:-0} + ${LONGHAUL_CHAINED:-0}))
say() { echo "$(date '+%F %T') launch: job $SLURM_JOB_ID: $*"; }

mkdir -p "$logs"
attempt=1
until mkdir "$logs/attempt-$attempt" 2>/dev/null; do
    [ -d "$logs/attempt-$attempt" ] || { say "cannot write to $logs"; exit 1; }
    attempt=$((attempt + 1))
done
output=$logs/attempt-$attempt
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 16 + restarts) % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
LONGHAUL_ATTEMPT=$attempt
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS LONGHAUL_ATTEMPT
say "attempt $attempt on $SLURM_JOB_NODELIST, output in $output"

if [ "$policy" = chain ] && [ $restarts -lt "$max_restarts" ]; then # queued now, so that a lost node cannot prevent it
    next=$(env -u SLURM_RESTART_COUNT LONGHAUL_CHAINED=$((restarts + 1)) sbatch --parsable \
        --dependency="afternotok:$SLURM_JOB_ID" --kill-on-invalid-dep=yes "$0")
    [ -z "$next" ] || echo "$next" >>"$jobs"
fi

srun --kill-on-bad-exit=1 --unbuffered "${srun_arguments[@]}" --output="$output/rank-%t.log" "${rank[@]}" 2>"$output/srun.log"
code=$?
cat "$output/srun.log"
if [ $code -gt 128 ]; then # srun killed ranks: the code is that of those that ended by themselves
    code=$(sed -n 's/.*[Ee]xited with exit code \([0-9]*\)$/\1/p' "$output/srun.log" | sort -n | tail -n 1)
    [ "${code:-129}" -le 128 ] || code=1
fi

case $restarted in *" $code "*) again=yes ;; *) again=no ;; esac
if [ "$told" ]; then # cancelled, preempted, requeued: SLURM knows what comes next. Out of time: it does nothing more
    case $(scontrol show job --oneliner "$SLURM_JOB_ID") in *Reason=TimeLimit*) ;; *) again=no ;; esac
fi

restart="restart $((restarts + 1)) of $max_restarts"
if [ $code = 0 ]; then
    then=done
elif [ $again = no ] && [ "$told" ]; then
    then="ended by SLURM, which knows what follows"
elif [ $again = no ] || [ "$policy" = none ]; then
    then="not to be started again"
elif [ $restarts -ge "$max_restarts" ]; then
    then="not started again after $restarts restarts; see $output"
elif [ "$next" ]; then
    then="goes on as job $next ($restart)"
    next=
elif [ "$policy" = requeue ]; then
    then="to be requeued ($restart)"
    requeue=yes
else
    then="no job follows it: submit the run once more"
fi
say "attempt $attempt ended with exit $code: $then"
[ -z "$next" ] || scancel "$next"
[ -z "$requeue" ] || scontrol requeue "$SLURM_JOB_ID" || say "not requeued: submit the run once more"
exit $code
