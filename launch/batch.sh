# Starts the ranks and acts on how they end. What follows an end is decided by launch/policy.py; only this shell
# gives orders to SLURM. Where no Python answers on this node, it goes by the exit code alone.
set +e
told='' next='' started=''
trap 'told=yes' TERM # SLURM ends the job and tells the ranks as well: stay to see how they end
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of whoever submitted the job

say() { echo "$(date '+%F %T') launch: job $SLURM_JOB_ID: $*"; }
field() { grep -o " $1=[^ ]*" <<<"$facts" | head -n 1 | cut -d = -f 2; }
epoch() { case $1 in '' | None | Unknown | N/A) ;; *) date -d "$1" +%s 2>/dev/null ;; esac; }

ask_slurm() { # what the policy has to know
    facts=$(timeout 20 scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null)
    nodes=$(field NodeList)
    nodes=$(scontrol show hostnames "${nodes:-$SLURM_JOB_NODELIST}")
    dead=$(timeout 20 sinfo --noheader --Node --format='%N %T' 2>/dev/null | awk '$2 ~ /down|fail|[*]/ {print $1}' | sort -u)
}

call_policy() { # begin | end ATTEMPT; false where it gives no answer
    local answer
    answer=$(job_state=$(field JobState) job_reason=$(field Reason) job_restarts=$(field Restarts) \
        job_preempted=$(field PreemptTime) nodes=$nodes dead=$dead queued=$queued told=$told code=$code next=$next \
        tasks=$tasks shell=$$ "${python[@]}" -P -m launch.batch "$1" "$submission" "${@:2}") && eval "$answer"
}

begin_without_python() {
    action=run attempt=1 ranks_on=$(head -n "$wanted" <<<"$nodes" | paste -sd ,)
    until mkdir "$logs/attempt-$attempt" 2>/dev/null; do
        [ -d "$logs/attempt-$attempt" ] || { say "cannot write to $logs"; exit 1; }
        attempt=$((attempt + 1))
    done
}

end_without_python() {
    [ "$code" -le 128 ] || code=$(sed -n 's/.*[Ee]xited with exit code \([0-9]*\)$/\1/p' "$output/srun.log" | sort -n | tail -n 1)
    code=${code:-1} by=''
    [ "$code" != 2 ] || command -v "${python[0]}" >/dev/null || code=1 # no Python on this node: the next may have it
    case " $restarted " in *" $code "*) by=$restart ;; esac
    [ "$restarts" -lt "$max_restarts" ] || [ "$code" = 3 ] || by='' # an orderly stop is no fault
    if [ "$told" ] && [ "$(field Reason)" != TimeLimit ]; then by=''; fi # cancelled, preempted: SLURM knows what follows
    case $by in chain) by=successor ;; none) by='' ;; esac
    [ "$code" = 0 ] && follows=done || follows=${by:-not to be started again}
    say "attempt $attempt ended with exit $code: $follows, by its exit code alone"
}

run_ranks() {
    srun --kill-on-bad-exit=1 --unbuffered --nodes="$wanted" --ntasks=$((wanted * tasks)) --ntasks-per-node="$tasks" \
        --nodelist="$ranks_on" "${srun_arguments[@]}" --output="$output/rank-%t.log" "${rank[@]}" 2>"$output/srun.log" &
    local ranks=$! end
    while :; do
        wait "$ranks"
        code=$?
        { [ $code -gt 128 ] && kill -0 "$ranks" 2>/dev/null; } || break
        end=$((SECONDS + LONGHAUL_KILL_WAIT_S / 2)) # TERM ended the wait. SLURM kills this shell as well, after the whole of it
        while kill -0 "$ranks" 2>/dev/null && [ $SECONDS -lt $end ]; do sleep 0.1; done
        ask_slurm
        if kill -0 "$ranks" 2>/dev/null && [ "$(field JobState)" != RUNNING ]; then break; fi
    done
    cat "$output/srun.log"
}

submit() { # a job of the same script, with further options of sbatch; its id is in `next`
    next=$(env -u SLURM_RESTART_COUNT LONGHAUL_CHAINED=$((restarts + 1)) sbatch --parsable "$@" "$0")
    [ -z "$next" ] || echo "$next" >>"$jobs"
}

exclude_from() { # only a job that waits can be told which nodes to avoid, this one while SLURM puts it back too
    [ -z "$exclude" ] || scontrol update jobid="$1" ExcNodeList="$exclude" || say "$exclude could not be excluded"
}

requeue() {
    local try
    for try in 1 2 3 4 5; do
        scontrol requeue "$SLURM_JOB_ID" && break
        ask_slurm
        [ "$(field Restarts)" = "${SLURM_RESTART_COUNT:-0}" ] || break # SLURM has done so
        [ $try != 5 ] || { say "cannot be requeued: another job follows"; follow; return; }
        [ "$told" ] || sleep 5
    done
    exclude_from "$SLURM_JOB_ID"
}

follow() {
    if submit --dependency="afterany:$SLURM_JOB_ID" ${exclude:+--exclude="$exclude"}; [ "$next" ]; then
        say "goes on as job $next"
    else
        say "no job follows it: submit the run once more"
    fi
}

kill_wait=$(timeout 20 scontrol show config 2>/dev/null | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
kill_wait=${kill_wait:-30}
export LONGHAUL_KILL_WAIT_S=$((kill_wait > 5 ? kill_wait : 5)) # SLURM never kills sooner than 5 s after TERM
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${logs%/logs}/compile-cache} # warm on every node after the first start
export PYTHONPATH=$code_folder${PYTHONPATH:+:${PYTHONPATH#"$code_folder":}} PYTHONSAFEPATH=1 # the code as it was submitted
restarts=$((${SLURM_RESTART_COUNT:-0} + ${LONGHAUL_CHAINED:-0}))
mkdir -p "$logs"
while :; do
    action='' by='' exclude='' code=''
    ask_slurm
    queued=$([ "$started" ] || epoch "$(field SubmitTime)")
    LONGHAUL_END_TIME=$([ "$(field TimeLimit)" = UNLIMITED ] || epoch "$(field EndTime)")
    export LONGHAUL_END_TIME
    [ "$LONGHAUL_END_TIME" ] || unset LONGHAUL_END_TIME
    call_policy begin || begin_without_python
    [ "$action" = run ] || break
    output=$logs/attempt-$attempt
    export LONGHAUL_ATTEMPT=$attempt
    export MASTER_ADDR=${ranks_on%%,*} MASTER_PORT=$((10000 + RANDOM % 20000))
    say "attempt $attempt on $ranks_on, output in $output"
    if [ "$restart" = chain ] && [ -z "$started" ]; then
        submit --dependency="afternotok:$SLURM_JOB_ID" --kill-on-invalid-dep=yes # now: a lost node cannot prevent it
    fi
    started=yes
    run_ranks
    ask_slurm
    call_policy end "$attempt" || end_without_python
    [ "$by" = here ] || break
done
case $by in
requeue) requeue ;;
submit) follow ;;
successor) exclude_from "$next" ;;
slurm) exclude_from "$SLURM_JOB_ID" ;;
*) [ -z "$next" ] || scancel "$next" ;;
esac
exit "$code"
