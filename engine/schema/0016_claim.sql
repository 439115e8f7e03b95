-- A claim and what goes with it, for half of the CPU time.

-- Both have a statement with an array in it. A plan for any array looks dearer than one for the array at hand, which has one
-- element mostly, so that each claim was planned anew. Otherwise take is that of 0011.
ALTER FUNCTION duroxide.take(uuid, integer) SET plan_cache_mode = force_generic_plan;

-- As in 0011, but for that, and that where no signal is unseen there is none to mark. One that comes meanwhile stays unseen: the
-- inbox delivers it, and if it is read with the instance as well, its number says so.
CREATE OR REPLACE FUNCTION duroxide.claim(p_worker uuid, p_limit integer)
RETURNS TABLE (instance_id text, token uuid, fresh boolean, crashes integer)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_sort = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_unseen boolean;
    v_called text[] := '{}';
    v_due text[];
BEGIN
    IF p_limit <= 0 THEN
        RETURN;
    END IF;
    v_unseen := EXISTS (SELECT FROM duroxide.signals s WHERE NOT s.seen);
    IF v_unseen THEN
        v_called := ARRAY(SELECT q.instance_id FROM duroxide.signals s JOIN duroxide.queue q ON q.instance_id = s.instance_id
                           WHERE NOT s.seen AND q.owner IS NULL
                           LIMIT (p_limit + 1) / 2 FOR UPDATE OF q SKIP LOCKED);
    END IF;
    v_due := ARRAY(SELECT q.instance_id FROM duroxide.queue q
                    WHERE q.owner IS NULL AND q.wake_at <= v_now
                    ORDER BY q.wake_at LIMIT p_limit - cardinality(v_called) FOR UPDATE SKIP LOCKED);
    v_due := v_due || v_called;
    IF v_due = '{}' THEN
        RETURN;
    END IF;
    PERFORM FROM duroxide.workers w WHERE w.id = p_worker FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    IF v_unseen THEN
        UPDATE duroxide.signals s SET seen = true
         WHERE s.seq IN (SELECT n.seq FROM duroxide.signals n
                          WHERE NOT n.seen AND n.instance_id = ANY (v_due) FOR UPDATE SKIP LOCKED);
    END IF;
    RETURN QUERY
    UPDATE duroxide.queue q
       SET owner = p_worker, token = gen_random_uuid(), claims = q.claims + 1, started_at = COALESCE(q.started_at, v_now)
     WHERE q.instance_id = ANY (v_due)
    RETURNING q.instance_id, q.token, q.claims = 1, q.crashes;
END $$;
