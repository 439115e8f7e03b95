-- A claim and what goes with it, for half of the CPU time.

-- As in 0011, with what claim does in place, so that one statement both claims and reads. A plan for any array looks dearer
-- than one for the array at hand, which has one element mostly, so that each claim was planned anew: hence plan_cache_mode.
-- Where no signal is unseen there is none to mark. One that comes meanwhile stays unseen: the inbox delivers it, and if it was
-- read here as well, its number says so.
CREATE OR REPLACE FUNCTION duroxide.take(p_worker uuid, p_limit integer) RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_sort = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_called text[] := '{}';
    v_due text[];
    v_unseen boolean;
    v_taken jsonb;
BEGIN
    IF p_limit <= 0 THEN
        RETURN NULL;
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
        RETURN NULL;
    END IF;
    PERFORM FROM duroxide.workers w WHERE w.id = p_worker FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF v_unseen THEN
        UPDATE duroxide.signals s SET seen = true
         WHERE s.seq IN (SELECT n.seq FROM duroxide.signals n
                          WHERE NOT n.seen AND n.instance_id = ANY (v_due) FOR UPDATE SKIP LOCKED);
    END IF;
    -- Behind that statement, hence with a snapshot in which every signal is that it has marked.
    WITH c AS (
        UPDATE duroxide.queue q
           SET owner = p_worker, token = gen_random_uuid(), claims = q.claims + 1, started_at = COALESCE(q.started_at, v_now)
         WHERE q.instance_id = ANY (v_due)
        RETURNING q.instance_id, q.token, q.claims = 1 AS fresh, q.crashes)
    SELECT jsonb_agg(jsonb_build_array(c.instance_id, c.token, c.fresh, c.crashes, i.whole))
      INTO v_taken
      FROM c LEFT JOIN LATERAL (
           SELECT jsonb_build_array(i.label, i.graph::text, i.vars, i.database, i.submitted_by::oid::int8,
                      (SELECT jsonb_agg(jsonb_build_array(s.instance_id, s.seq, s.kind, s.name, s.data) ORDER BY s.seq)
                         FROM duroxide.signals s WHERE s.instance_id = i.id)) AS whole
             FROM duroxide.instances i
            WHERE i.id = c.instance_id AND c.fresh AND cardinality(v_due) <= 10 AND pg_column_size(i.graph) < 20000
           ) AS i ON true;
    RETURN v_taken;
END $$;
