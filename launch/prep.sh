# One job of `launch prep`: runs its share of a stage, and goes back into the queue when its time is over before that.
set +e
work='' late=''
say() { echo "$(date '+%F %T') launch: job $SLURM_JOB_ID: $*"; }
trap '[ -z "$work" ] || kill -TERM "$work"' TERM # SLURM ends the job; whether it comes back SLURM knows
trap 'late=yes; [ -z "$work" ] || kill -USR2 "$work"' USR2 # its time is nearly over
cd -- "$here" || { say "$here is not on $(hostname)"; exit 1; }
export PYTHONPATH=$code_folder${PYTHONPATH:+:${PYTHONPATH#"$code_folder":}} PYTHONSAFEPATH=1 # the code as it was submitted
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
export LONGHAUL_LOG=$submission/$stem-${id:-$SLURM_JOB_ID}.log
share=$((first + ${SLURM_ARRAY_TASK_ID:-0}))
say "$stem on $(hostname), start $((${SLURM_RESTART_COUNT:-0} + 1))"
"${python[@]}" -P -u -m data_pipeline.cli "${command[@]//SHARE/$share}" &
work=$!
while :; do
    wait "$work"
    code=$?
    { [ $code -gt 128 ] && kill -0 "$work" 2>/dev/null; } || break # a signal ended the wait, not the work
done
if [ $code -gt 128 ]; then
    wait "$work" # where the work ended just then
    ended=$?
    [ $ended = 127 ] || code=$ended
fi
if [ "$stem" = seal ] && [ $code != 0 ]; then grep -h '^data-prep: ' "$submission"/plan-*.log; fi # what it began with
say "exit $code"
if [ "$late" ] && [ $code = 3 ] && [ "$restart" = requeue ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
