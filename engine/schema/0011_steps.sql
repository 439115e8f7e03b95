-- What steps cost the server: a narrower way to record them, and polls that read no more than they need.

-- What a step records in most cases, by a narrower way than duroxide.checkpoint: one result, and maybe the workflow's end. A
-- third of the time that a checkpoint takes went into its call and its JSON. Workers that know of it use it; the others go on
-- with checkpoint, and so does everything else that is to be recorded.
-- A procedure: CALL is no query, which would be planned and executed anew for each step.
--
-- Records a completed leaf, if and only if the worker still holds the instance (p_token); otherwise raises DF001, which rolls
-- back the step that runs in the same transaction. The arguments are the columns of duroxide.history.
--   p_ends: the instance ends as completed, with p_result as its output.
-- SECURITY DEFINER: as checkpoint, for executors, which prove their right by the token.
CREATE OR REPLACE PROCEDURE duroxide.step_done(
    p_instance text, p_token uuid, p_execution text, p_node integer, p_result text, p_types jsonb, p_meta jsonb,
    p_started timestamptz, p_ends boolean)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
BEGIN
    -- Whoever deletes an instance locks its row before the queue's; in the other order the two would wait for each other.
    IF p_ends THEN
        -- A cancel that committed first has set the status already; it stays.
        UPDATE duroxide.instances i
           SET status = 'completed', output = p_result, error = NULL, started_at = q.started_at,
               updated_at = clock_timestamp(), ended_at = clock_timestamp()
          FROM duroxide.queue q
         WHERE i.id = p_instance AND i.status IN ('pending', 'running') AND q.instance_id = p_instance AND q.token = p_token;
        DELETE FROM duroxide.queue q WHERE q.instance_id = p_instance AND q.token = p_token;
    ELSE
        PERFORM FROM duroxide.queue q WHERE q.instance_id = p_instance AND q.token = p_token FOR UPDATE;
    END IF;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'lease on instance % lost', p_instance USING ERRCODE = 'DF001';
    END IF;
    INSERT INTO duroxide.history AS h (instance_id, execution, node, event, result, types, meta, started_at)
    VALUES (p_instance, p_execution, p_node, 'completed', p_result, p_types, p_meta, p_started)
    ON CONFLICT (instance_id, execution, node) DO UPDATE
       SET event = EXCLUDED.event, result = EXCLUDED.result, types = EXCLUDED.types, error = NULL, meta = EXCLUDED.meta,
           started_at = COALESCE(EXCLUDED.started_at, h.started_at), ended_at = EXCLUDED.ended_at;
    IF p_ends THEN
        DELETE FROM duroxide.signals WHERE instance_id = p_instance;
    END IF;
END $$;
REVOKE ALL ON PROCEDURE duroxide.step_done(text, uuid, text, integer, text, jsonb, jsonb, timestamptz, boolean) FROM PUBLIC;

-- As in 0007, with the procedure beside the function.
CREATE OR REPLACE FUNCTION duroxide.register_executor(p_role oid) RETURNS void
LANGUAGE plpgsql STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_executor text := 'dfx_' || p_role;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = v_executor AND r.rolcanlogin AND NOT r.rolinherit AND NOT r.rolsuper
                      AND NOT r.rolcreaterole AND NOT r.rolcreatedb AND NOT r.rolreplication AND NOT r.rolbypassrls)
        OR (SELECT array_agg(DISTINCT m.roleid) FROM pg_auth_members m WHERE m.member = to_regrole(v_executor))
            IS DISTINCT FROM ARRAY[p_role]
        OR EXISTS (SELECT FROM pg_auth_members m WHERE m.member = to_regrole(v_executor) AND m.admin_option) THEN
        RAISE EXCEPTION 'role % is not a sound executor login for role %', v_executor, p_role::regrole
            USING ERRCODE = '42501',
                  HINT = 'It must be LOGIN NOINHERIT, without any further right, and a member of that role alone.';
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA duroxide TO %I', v_executor);
    EXECUTE format('GRANT EXECUTE ON FUNCTION duroxide.checkpoint(text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb)'
                   ' TO %I', v_executor);
    EXECUTE format('GRANT EXECUTE ON PROCEDURE duroxide.step_done(text, uuid, text, integer, text, jsonb, jsonb, timestamptz, boolean)'
                   ' TO %I', v_executor);
    INSERT INTO duroxide.executors (role, executor) VALUES (p_role, to_regrole(v_executor))
    ON CONFLICT (role) DO UPDATE SET executor = EXCLUDED.executor, password_set = false
        WHERE executors.executor <> EXCLUDED.executor;
    IF NOT has_database_privilege(v_executor, current_database(), 'CONNECT') THEN
        RAISE WARNING 'executor login % may not connect to this database', v_executor
            USING HINT = format('Run: GRANT CONNECT ON DATABASE %I TO %I', current_database(), v_executor);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION duroxide.forget_executor(p_role oid) RETURNS boolean
LANGUAGE plpgsql STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_executor regrole;
BEGIN
    IF has_schema_privilege(p_role, 'df', 'USAGE') THEN
        RETURN false;
    ELSIF EXISTS (SELECT FROM duroxide.instances i WHERE i.submitted_by = p_role AND i.status IN ('pending', 'running')) THEN
        RAISE NOTICE 'executor login dfx_% is kept: workflows of role % have not ended', p_role, p_role::regrole
            USING HINT = 'Revoke again once they have.';
        RETURN false;
    END IF;
    DELETE FROM duroxide.executors e WHERE e.role = p_role RETURNING e.executor INTO v_executor;
    IF NOT FOUND OR NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = v_executor) THEN
        RETURN false;
    END IF;
    EXECUTE format('REVOKE ALL ON FUNCTION duroxide.checkpoint(text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb)'
                   ' FROM %s', v_executor);
    EXECUTE format('REVOKE ALL ON PROCEDURE duroxide.step_done(text, uuid, text, integer, text, jsonb, jsonb, timestamptz, boolean)'
                   ' FROM %s', v_executor);
    EXECUTE format('REVOKE ALL ON SCHEMA duroxide FROM %s', v_executor);
    RETURN true;
END $$;

-- Executor logins that there are already.
DO $$
DECLARE
    v_executor name;
BEGIN
    FOR v_executor IN SELECT r.rolname FROM duroxide.executors e JOIN pg_roles r ON r.oid = e.executor LOOP
        EXECUTE format('GRANT EXECUTE ON PROCEDURE duroxide.step_done(text, uuid, text, integer, text, jsonb, jsonb, timestamptz, boolean)'
                       ' TO %I', v_executor);
    END LOOP;
END $$;

-- Whether anything is due that nobody holds. The time in a variable: clock_timestamp() itself is no condition that an index
-- can be searched by, so that a million parked instances were read one by one.
CREATE OR REPLACE FUNCTION duroxide.overdue() RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    RETURN EXISTS (SELECT FROM duroxide.queue q WHERE q.owner IS NULL AND q.wake_at <= v_now);
END $$;

-- As in 0001. Most of the time nobody has sent anything, and what the worker holds, be it a thousand instances, need not be
-- looked through at every poll.
CREATE OR REPLACE FUNCTION duroxide.inbox(p_worker uuid, p_handled bigint[])
RETURNS TABLE (seq bigint, instance_id text, kind text, name text, data text)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    IF p_handled <> '{}' THEN
        UPDATE duroxide.signals s SET seen = true
         WHERE s.seq IN (SELECT n.seq FROM duroxide.signals n WHERE n.seq = ANY (p_handled) AND NOT n.seen
                            FOR UPDATE SKIP LOCKED);
    END IF;
    IF NOT EXISTS (SELECT FROM duroxide.signals s WHERE NOT s.seen) THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT s.seq, s.instance_id, s.kind, s.name, s.data
      FROM duroxide.signals s JOIN duroxide.queue q ON q.instance_id = s.instance_id
     WHERE NOT s.seen AND q.owner = p_worker LIMIT 1000;
END $$;

-- As in 0001, but for the order of locks: that of step_done.
CREATE OR REPLACE FUNCTION duroxide.checkpoint(
    p_instance text, p_token uuid, p_rows jsonb, p_result text DEFAULT NULL,
    p_consumed bigint[] DEFAULT NULL, p_prune text[] DEFAULT NULL, p_keep jsonb DEFAULT NULL,
    p_park timestamptz DEFAULT NULL, p_finish jsonb DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_started timestamptz;
    v_path text;
BEGIN
    IF p_finish IS NOT NULL THEN
        PERFORM FROM duroxide.instances i WHERE i.id = p_instance FOR NO KEY UPDATE;
    END IF;
    SELECT q.started_at INTO v_started FROM duroxide.queue q
     WHERE q.instance_id = p_instance AND q.token = p_token FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'lease on instance % lost', p_instance USING ERRCODE = 'DF001';
    END IF;
    INSERT INTO duroxide.history AS h
           (instance_id, execution, node, event, result, types, error, meta, started_at)
    SELECT p_instance, r.execution, r.node, r.event, CASE WHEN r.big THEN p_result ELSE r.result END,
           r.types, r.error, r.meta, r.started_at
      FROM jsonb_to_recordset(p_rows) AS r(execution text, node integer, event text, result text, big boolean,
                                           types jsonb, error jsonb, meta jsonb, started_at timestamptz)
    ON CONFLICT (instance_id, execution, node) DO UPDATE
       SET event = EXCLUDED.event, result = EXCLUDED.result, types = EXCLUDED.types, error = EXCLUDED.error,
           meta = CASE EXCLUDED.event WHEN 'failed' THEN COALESCE(EXCLUDED.meta, h.meta) ELSE EXCLUDED.meta END,
           started_at = COALESCE(EXCLUDED.started_at, h.started_at),
           ended_at = EXCLUDED.ended_at;
    IF p_consumed IS NOT NULL THEN
        DELETE FROM duroxide.signals WHERE seq = ANY (p_consumed) AND instance_id = p_instance;
    END IF;
    IF p_prune IS NOT NULL THEN
        FOREACH v_path IN ARRAY p_prune LOOP
            DELETE FROM duroxide.history h
             WHERE h.instance_id = p_instance
               AND (h.execution = v_path OR (h.execution > v_path || '/' AND h.execution < v_path || '0'))
               AND NOT COALESCE(p_keep, '[]') @> jsonb_build_array(jsonb_build_array(h.execution, h.node));
        END LOOP;
    END IF;
    IF p_finish IS NOT NULL THEN
        -- A cancel that committed first has set the status already; it stays.
        UPDATE duroxide.instances
           SET status = p_finish->>'status',
               output = CASE WHEN (p_finish->>'output_is_result')::boolean THEN p_result ELSE p_finish->>'output' END,
               error = NULLIF(p_finish->'error', 'null'), started_at = v_started,
               updated_at = clock_timestamp(), ended_at = clock_timestamp()
         WHERE id = p_instance AND status IN ('pending', 'running');
        DELETE FROM duroxide.queue WHERE instance_id = p_instance;
        DELETE FROM duroxide.signals WHERE instance_id = p_instance;
    ELSIF p_park IS NOT NULL THEN
        UPDATE duroxide.queue SET owner = NULL, token = NULL, wake_at = p_park WHERE instance_id = p_instance;
    END IF;
END $$;

-- Several checkpoints in one transaction, each as the JSON array of checkpoint's arguments in their text form. Returns the
-- places (from 1) of those whose lease is lost; the others are written.
CREATE OR REPLACE FUNCTION duroxide.checkpoints(p_items jsonb) RETURNS integer[]
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    v_item jsonb;
    v_place integer := 0;
    v_lost integer[] := '{}';
BEGIN
    FOR v_item IN SELECT e.value FROM jsonb_array_elements(p_items) WITH ORDINALITY AS e(value, n) ORDER BY e.n LOOP
        v_place := v_place + 1;
        IF v_item->>8 IS NOT NULL THEN
            PERFORM FROM duroxide.instances i WHERE i.id = v_item->>0 FOR NO KEY UPDATE;
        END IF;
        PERFORM FROM duroxide.queue q WHERE q.instance_id = v_item->>0 AND q.token = (v_item->>1)::uuid FOR UPDATE;
        IF FOUND THEN
            PERFORM duroxide.checkpoint(v_item->>0, (v_item->>1)::uuid, (v_item->>2)::jsonb, v_item->>3, (v_item->>4)::bigint[],
                                        (v_item->>5)::text[], (v_item->>6)::jsonb, (v_item->>7)::timestamptz, (v_item->>8)::jsonb);
        ELSE
            v_lost := v_lost || v_place;
        END IF;
    END LOOP;
    RETURN v_lost;
END $$;

-- As in 0001, with the same look first. Joined from the wrong end, as it may be when statistics are old, the queue would be read
-- from end to end.
CREATE OR REPLACE FUNCTION duroxide.claim(p_worker uuid, p_limit integer)
RETURNS TABLE (instance_id text, token uuid, fresh boolean, crashes integer)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_sort = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_called text[] := '{}';
    v_due text[];
BEGIN
    IF p_limit <= 0 THEN
        RETURN;
    END IF;
    IF EXISTS (SELECT FROM duroxide.signals s WHERE NOT s.seen) THEN
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
    UPDATE duroxide.signals s SET seen = true
     WHERE s.seq IN (SELECT n.seq FROM duroxide.signals n
                      WHERE NOT n.seen AND n.instance_id = ANY (v_due) FOR UPDATE SKIP LOCKED);
    RETURN QUERY
    UPDATE duroxide.queue q
       SET owner = p_worker, token = gen_random_uuid(), claims = q.claims + 1, started_at = COALESCE(q.started_at, v_now)
     WHERE q.instance_id = ANY (v_due)
    RETURNING q.instance_id, q.token, q.claims = 1, q.crashes;
END $$;

-- claim, and with it what the worker would read next, where that is little: a few new instances, whose graphs are not large.
-- Returns [[instance_id, token, fresh, crashes, null or [label, graph, vars, database, submitted_by, inbox]]], or NULL.
CREATE OR REPLACE FUNCTION duroxide.take(p_worker uuid, p_limit integer) RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
DECLARE
    v_ids text[];
    v_tokens uuid[];
    v_fresh boolean[];
    v_crashes integer[];
BEGIN
    SELECT array_agg(c.instance_id), array_agg(c.token), array_agg(c.fresh), array_agg(c.crashes)
      INTO v_ids, v_tokens, v_fresh, v_crashes FROM duroxide.claim(p_worker, p_limit) c;
    IF v_ids IS NULL THEN
        RETURN NULL;
    END IF;
    -- A statement of its own, hence with a snapshot of its own: every signal that the claim has marked as seen is in it.
    RETURN (SELECT jsonb_agg(jsonb_build_array(c.instance_id, c.token, c.fresh, c.crashes, i.whole))
              FROM unnest(v_ids, v_tokens, v_fresh, v_crashes) AS c(instance_id, token, fresh, crashes)
              LEFT JOIN LATERAL (
                   SELECT jsonb_build_array(i.label, i.graph::text, i.vars, i.database, i.submitted_by::oid::int8,
                              (SELECT jsonb_agg(jsonb_build_array(s.instance_id, s.seq, s.kind, s.name, s.data) ORDER BY s.seq)
                                 FROM duroxide.signals s WHERE s.instance_id = i.id)) AS whole
                     FROM duroxide.instances i
                    WHERE i.id = c.instance_id AND c.fresh AND cardinality(v_ids) <= 10 AND pg_column_size(i.graph) < 20000
                   ) AS i ON true);
END $$;
REVOKE ALL ON FUNCTION duroxide.take(uuid, integer) FROM PUBLIC;
