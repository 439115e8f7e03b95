-- Lists and figures: SURFACE sections 1.5, 9.1 to 9.3, 9.5, 9.7.
-- VOLATILE as in the original, hence no inlining into the caller's query.

-- The generation that an instance is in: a root loop's round, else 1.
CREATE FUNCTION duroxide.generation(p_instance text) RETURNS bigint
LANGUAGE sql STABLE STRICT
RETURN COALESCE((SELECT (h.meta->>'round')::bigint FROM duroxide.history h
                  WHERE h.instance_id = p_instance AND h.execution = '' AND h.node = 0 AND h.event = 'round'), 1);

-- Opaque to clients: where a page ended, in hexadecimal.
CREATE FUNCTION duroxide.cursor_of(p_created_at timestamptz, p_id text) RETURNS text
LANGUAGE sql STABLE STRICT
RETURN encode(convert_to('v1|' || to_char(p_created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') || '+00:00|' || p_id, 'UTF8'), 'hex');

CREATE FUNCTION duroxide.check_limit(p_limit integer) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_max integer := COALESCE(duroxide.setting('list_instances_max_limit')::integer, 1000);
BEGIN
    IF p_limit IS NULL THEN
        RAISE EXCEPTION 'df.list_instances: limit_count cannot be NULL' USING ERRCODE = '22004';
    ELSIF p_limit < 1 THEN
        RAISE EXCEPTION 'limit_count must be at least 1' USING ERRCODE = '22023';
    ELSIF p_limit > v_max THEN
        RAISE EXCEPTION 'df.list_instances: limit_count (%) exceeds pg_durable.list_instances_max_limit (%)', p_limit, v_max
            USING ERRCODE = '22023',
                  HINT = 'Ask for fewer rows, or page: df.list_instances(status, limit, label, after_cursor => next_cursor).';
    END IF;
END $$;

-- plan_cache_mode: filters that are NULL fall away, and the index that fits the others is used. No sort: an index is walked in
-- the order of the pages, and no further than one page, however many rows the planner expects to pass the filters. No JIT:
-- before version 18 what is switched off is only made to look expensive, and so worth compiling.
CREATE FUNCTION df.list_instances(status_filter text, limit_count integer, label_filter text, after_cursor text DEFAULT NULL)
RETURNS TABLE (instance_id text, label text, function_name text, status text, execution_count bigint, output text,
               created_at timestamptz, completed_at timestamptz, next_cursor text)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan SET enable_sort = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_after text[];
    v_created_at timestamptz;
    v_stored text := CASE status_filter WHEN 'running' THEN 'pending' ELSE status_filter END;
BEGIN
    PERFORM duroxide.check_limit(limit_count);
    IF after_cursor IS NOT NULL THEN
        BEGIN
            IF length(after_cursor) <= 512 AND after_cursor ~ '^([0-9a-f]{2})+$' THEN
                v_after := regexp_match(convert_from(decode(after_cursor, 'hex'), 'UTF8'),
                    '^v1\|(\d{4,}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00)\|([0-9a-f]{8})$');
                v_created_at := v_after[1];
            END IF;
        EXCEPTION WHEN data_exception THEN
            v_created_at := NULL;
        END;
        IF v_created_at IS NULL THEN
            RAISE EXCEPTION 'df.list_instances: invalid after_cursor'
                USING ERRCODE = '22023', HINT = 'Pass next_cursor of the page before, unchanged.';
        END IF;
    END IF;
    RETURN QUERY
    WITH page AS (
        SELECT i.id, i.label, duroxide.shown_status(i.status, q.started_at) AS status, i.output, i.created_at, i.ended_at,
               i.status AS stored
          FROM duroxide.instances i
          LEFT JOIN duroxide.queue q ON q.instance_id = i.id
         -- As shown_status says it, in terms that the planner can estimate: else it sorts all that are pending.
         WHERE (status_filter IS NULL OR i.status = v_stored
                AND (v_stored <> 'pending' OR (q.started_at IS NOT NULL) = (status_filter = 'running')))
           AND (label_filter IS NULL OR i.label = label_filter)
           AND (v_created_at IS NULL OR i.created_at <= v_created_at AND (i.created_at < v_created_at OR i.id > v_after[2]))
         ORDER BY i.created_at DESC, i.id
         LIMIT limit_count + 1
    ), shown AS (
        SELECT p.*, row_number() OVER (ORDER BY p.created_at DESC, p.id) AS n, count(*) OVER () AS found FROM page p
    ), last AS (
        SELECT duroxide.cursor_of(s.created_at, s.id) AS next_cursor FROM shown s WHERE s.n = limit_count AND s.found > limit_count
    )
    SELECT s.id, s.label, 'pg_durable::orchestration::execute-function-graph'::text, s.status, duroxide.generation(s.id),
           s.output, s.created_at, CASE s.stored WHEN 'completed' THEN s.ended_at END, (SELECT l.next_cursor FROM last l)
      FROM shown s
     WHERE s.n <= limit_count
     ORDER BY s.n;
END $$;

CREATE FUNCTION df.list_instances(status_filter text DEFAULT NULL, limit_count integer DEFAULT 100)
RETURNS TABLE (instance_id text, label text, function_name text, status text, execution_count bigint, output text)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT l.instance_id, l.label, l.function_name, l.status, l.execution_count, l.output
                   FROM df.list_instances(status_filter, limit_count, NULL, NULL) l;
END $$;

CREATE FUNCTION df.instance_info(instance_id text)
RETURNS TABLE (instance_id text, label text, function_name text, function_version text, current_execution_id bigint,
               status text, output text)
LANGUAGE sql STRICT ROWS 1
BEGIN ATOMIC
    SELECT i.id::text, i.label, 'pg_durable::orchestration::execute-function-graph'::text, '1.0.0'::text,
           duroxide.generation(i.id::text), i.status, i.output
      FROM df.instances i WHERE i.id = $1;    -- by number: its name is also that of a column of the result
END;

CREATE FUNCTION df.instance_nodes(instance_id_param text)
RETURNS TABLE (node_id text, node_type text, query text, result_name text, left_node text, right_node text, status text,
               result text, status_details text, inferred_status text, inferred_status_from_ancestor_id text,
               updated_at timestamptz)
LANGUAGE sql STRICT
BEGIN ATOMIC
    SELECT n.id, n.node_type, n.query, n.result_name, n.left_node, n.right_node, n.status, n.result::text,
           n.status_details::text, n.inferred_status, n.inferred_from, n.updated_at
      FROM duroxide.node_rows(instance_nodes.instance_id_param) n;
END;

-- The older form. The second argument is ignored, as in the original.
CREATE FUNCTION df.instance_nodes(instance_id_param text, _last_n_executions integer)
RETURNS TABLE (execution_id bigint, node_id text, node_type text, query text, result_name text, left_node text,
               right_node text, status text, result text, updated_at timestamptz)
LANGUAGE sql STRICT
BEGIN ATOMIC
    SELECT 1::bigint, n.id, n.node_type, n.query, n.result_name, n.left_node, n.right_node, n.status, n.result::text, n.updated_at
      FROM duroxide.node_rows(instance_nodes.instance_id_param) n;
END;

-- Generations, newest first: the rounds of a root loop, else the one run. What was pruned shows no events.
CREATE FUNCTION df.instance_executions(instance_id text, limit_count integer DEFAULT 5)
RETURNS TABLE (execution_id bigint, status text, event_count bigint, duration_ms bigint, output text)
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_instance record;
    v_newest bigint;
    v_loop boolean;
BEGIN
    IF limit_count < 1 THEN
        RAISE EXCEPTION 'limit_count must be at least 1' USING ERRCODE = '22023';
    END IF;
    SELECT i.*, COALESCE(i.started_at, q.started_at) AS began, i.graph->0->>'type' AS root INTO v_instance
      FROM duroxide.instances i LEFT JOIN duroxide.queue q ON q.instance_id = i.id WHERE i.id = instance_executions.instance_id;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    v_newest := duroxide.generation(v_instance.id);
    v_loop := v_instance.root = 'LOOP';
    RETURN QUERY
    WITH rounds AS (
        SELECT CASE WHEN v_loop AND h.execution <> '' THEN (duroxide.rounds(h.execution))[2] ELSE v_newest END AS round,
               count(*) AS events, min(COALESCE(h.started_at, h.ended_at)) AS began, max(h.ended_at) AS ended
          FROM duroxide.history h WHERE h.instance_id = v_instance.id GROUP BY 1
    )
    SELECT g.n,
           CASE WHEN g.n < v_newest THEN 'ContinuedAsNew' WHEN v_instance.status = 'completed' THEN 'Completed'
                WHEN v_instance.status IN ('failed', 'cancelled') THEN 'Failed' ELSE 'Running' END,
           COALESCE(r.events, 0),
           CASE WHEN g.n < v_newest THEN COALESCE(extract(epoch FROM r.ended - r.began) * 1000, 0)
                WHEN v_instance.ended_at IS NOT NULL AND v_newest = 1
                    THEN COALESCE(extract(epoch FROM v_instance.ended_at - v_instance.began) * 1000, 0)
                WHEN v_instance.ended_at IS NOT NULL THEN COALESCE(extract(epoch FROM v_instance.ended_at - r.began) * 1000, 0)
                ELSE 0 END::bigint,
           CASE WHEN g.n < v_newest THEN jsonb_build_object('instance_id', v_instance.id, 'label', v_instance.label,
                    'vars', v_instance.vars, 'round', g.n + 1, 'graph', v_instance.graph)::text
                ELSE v_instance.output END
      FROM generate_series(v_newest, greatest(v_newest - least(limit_count, 10000) + 1, 1), -1) AS g(n)
      LEFT JOIN rounds r ON r.round = g.n
     ORDER BY g.n DESC;
END $$;

-- Totals over all roles: SECURITY DEFINER, to see past row security. EXECUTE is not PUBLIC.
CREATE FUNCTION df.metrics()
RETURNS TABLE (total_instances bigint, running_instances bigint, completed_instances bigint, failed_instances bigint,
               total_executions bigint, total_events bigint)
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
BEGIN ATOMIC
    SELECT i.total, i.running, i.completed, i.failed, i.total + COALESCE(e.more_rounds, 0), e.total
      FROM (SELECT count(*) AS total,
                   count(*) FILTER (WHERE s.status IN ('pending', 'running')) AS running,
                   count(*) FILTER (WHERE s.status = 'completed') AS completed,
                   count(*) FILTER (WHERE s.status IN ('failed', 'cancelled')) AS failed
              FROM duroxide.instances s) i,
           (SELECT count(*) AS total,
                   sum((h.meta->>'round')::bigint - 1)
                       FILTER (WHERE h.node = 0 AND h.event = 'round' AND h.execution = '')::bigint AS more_rounds
              FROM duroxide.history h) e;
END;
