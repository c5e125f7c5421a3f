-- Stored procedures that a careless caller gets wrong, for MariaDB.
--
-- A line that holds only // ends a statement; comments are lines of their own. They are to be
-- created by the all-powerful user, because np_definer_write acts with its creator's rights.
-- np_session and np_getlock leave something behind in the connection: do not use it again.
DROP TABLE IF EXISTS np_log
//
CREATE TABLE np_log (
  id INT AUTO_INCREMENT PRIMARY KEY, who VARCHAR(64), val BIGINT, at DATETIME(6) DEFAULT NOW(6)
) ENGINE=InnoDB
//
-- Neither parameters nor rows: the answer is a lone OK packet.
CREATE OR REPLACE PROCEDURE np_nothing()
BEGIN DECLARE x INT; SET x = 1; END
//
-- Gives its two arguments back as a row; text with quotes goes through b.
CREATE OR REPLACE PROCEDURE np_in(IN a INT, IN b VARCHAR(100)) READS SQL DATA
SELECT a AS a, b AS b
//
-- Only OUT parameters: 42, and a text with everything that has to be escaped somewhere.
CREATE OR REPLACE PROCEDURE np_out(OUT a INT, OUT b VARCHAR(50))
BEGIN SET a = 42; SET b = 'żółw ''quoted'' \\ %s'; END
//
-- Doubles its argument in place.
CREATE OR REPLACE PROCEDURE np_inout(INOUT a INT)
SET a = a * 2
//
-- Every mode at once, two result sets, and an OUT parameter that must come back as NULL even when
-- an earlier call left a value. (10, 5) gives (10,), then (15, 10) and (1, 2); b 15, c 3.333333.
CREATE OR REPLACE PROCEDURE np_mixed(
  IN a INT, INOUT b INT, OUT c DECIMAL(20,6), OUT never_set INT)
BEGIN
  SELECT a AS x;
  SET b = b + a;
  SELECT b AS y, a AS x UNION ALL SELECT 1, 2;
  SET c = a / 3;
END
//
-- Nineteen types by way of OUT. A user variable does not keep all of them.
CREATE OR REPLACE PROCEDURE np_types(
  OUT o_dec DECIMAL(30,10), OUT o_dt DATETIME(6), OUT o_date DATE, OUT o_time TIME(3),
  OUT o_ts TIMESTAMP, OUT o_json JSON, OUT o_bin VARBINARY(255), OUT o_blob BLOB, OUT o_null INT,
  OUT o_ubig BIGINT UNSIGNED, OUT o_bit BIT(9), OUT o_bool BOOLEAN, OUT o_year YEAR,
  OUT o_dbl DOUBLE, OUT o_flt FLOAT, OUT o_txt LONGTEXT, OUT o_enum ENUM('a','b'),
  OUT o_set SET('x','y'), OUT o_uuid CHAR(36))
BEGIN
  SET o_dec = 12345678901234567890.0123456789, o_dt = '2024-02-29 23:59:59.123456',
      o_date = '2024-02-29', o_time = '-12:34:56.789', o_ts = '2024-01-02 03:04:05',
      o_json = JSON_OBJECT('k', JSON_ARRAY(1, 2.5, NULL, 'ü')), o_bin = X'00FF27225C',
      o_blob = X'DEADBEEF00', o_null = NULL, o_ubig = 18446744073709551615,
      o_bit = b'101010101', o_bool = TRUE, o_year = 2024, o_dbl = 1e308, o_flt = 0.1,
      o_txt = REPEAT('ß', 10), o_enum = 'b', o_set = 'x,y', o_uuid = UUID();
END
//
-- Ten such types as columns of a row. PyMySQL gives bytes for BIT and text for the zero date.
CREATE OR REPLACE PROCEDURE np_types_rs()
SELECT CAST(12345678901234567890.0123456789 AS DECIMAL(30,10)) AS o_dec,
       CAST('2024-02-29 23:59:59.123456' AS DATETIME(6)) AS o_dt,
       CAST('2024-02-29' AS DATE) AS o_date, CAST('-12:34:56.789' AS TIME(3)) AS o_time,
       JSON_OBJECT('k', 1) AS o_json, X'00FF' AS o_bin, NULL AS o_null,
       CAST(18446744073709551615 AS UNSIGNED) AS o_ubig, b'101' AS o_bit,
       CAST('0000-00-00' AS DATE) AS zero_date
//
-- Six result sets: one has no rows but has columns, one uses a name twice, one names nothing.
CREATE OR REPLACE PROCEDURE np_multi()
BEGIN
  SELECT 1 AS a;
  SELECT 1 AS a WHERE FALSE;
  SELECT 1 AS a, 2 AS a;
  SELECT 1+1, NOW() IS NULL;
  SELECT NULL;
  SELECT 'last' AS z;
END
//
-- As many result sets as asked for, none included.
CREATE OR REPLACE PROCEDURE np_n_sets(IN n INT)
BEGIN DECLARE i INT DEFAULT 0; WHILE i < n DO SET i = i + 1; SELECT i AS i; END WHILE; END
//
-- Fails at once: the call itself raises 1644.
CREATE OR REPLACE PROCEDURE np_err_first()
SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'first'
//
-- Fails after a result set: a caller that stops at the first one never learns of error 5001.
CREATE OR REPLACE PROCEDURE np_err_mid()
BEGIN
  SELECT 1 AS before_error;
  SIGNAL SQLSTATE '45001' SET MYSQL_ERRNO = 5001, MESSAGE_TEXT = 'mid';
  SELECT 2 AS never;
END
//
-- Fails among the rows: row 5000 has two values where one may be, error 1242.
CREATE OR REPLACE PROCEDURE np_err_in_rows()
SELECT s.seq, (SELECT t.seq FROM seq_1_to_2 t WHERE s.seq = 5000 OR t.seq = 1) AS v
FROM seq_1_to_9000 s
//
-- Fails after an INSERT, which stays in the caller's transaction until that is rolled back.
CREATE OR REPLACE PROCEDURE np_err_after_dml(IN w VARCHAR(64)) MODIFIES SQL DATA
BEGIN
  INSERT INTO np_log(who, val) VALUES (w, 1);
  SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'after dml';
END
//
-- Warns (1642) and goes on to set a to 1.
CREATE OR REPLACE PROCEDURE np_warn(OUT a INT)
BEGIN SIGNAL SQLSTATE '01000' SET MESSAGE_TEXT = 'just a warning'; SET a = 1; END
//
-- Catches its own error, a duplicate key (1062), and tells of it through OUT parameters only.
CREATE OR REPLACE PROCEDURE np_handler(OUT code INT, OUT msg TEXT)
BEGIN
  DECLARE EXIT HANDLER FOR SQLEXCEPTION
    BEGIN GET DIAGNOSTICS CONDITION 1 code = MYSQL_ERRNO, msg = MESSAGE_TEXT; END;
  INSERT INTO np_log(id, who) VALUES (1, 'h'), (1, 'h');
END
//
-- Writes and reads in turn: two result sets, the new id and the number of changed rows.
CREATE OR REPLACE PROCEDURE np_dml_select(IN w VARCHAR(64), OUT new_id BIGINT, OUT n INT)
MODIFIES SQL DATA
BEGIN
  INSERT INTO np_log(who, val) VALUES (w, 1);
  SET new_id = LAST_INSERT_ID();
  SELECT who, val FROM np_log WHERE id = new_id;
  UPDATE np_log SET val = val + 1 WHERE id = new_id;
  SET n = ROW_COUNT();
  SELECT val FROM np_log WHERE id = new_id;
END
//
-- Commits half-way, the caller's earlier work included; the second row can still be rolled back.
CREATE OR REPLACE PROCEDURE np_commit(IN w VARCHAR(64))
BEGIN
  INSERT INTO np_log(who, val) VALUES (w, 1);
  COMMIT;
  SELECT 'committed' AS s;
  INSERT INTO np_log(who, val) VALUES (w, 2);
END
//
-- Rolls back, the caller's earlier work included, and says nothing of it.
CREATE OR REPLACE PROCEDURE np_rollback(IN w VARCHAR(64))
BEGIN INSERT INTO np_log(who, val) VALUES (w, 1); ROLLBACK; SELECT 'rolled back' AS s; END
//
-- Creates a table, and so commits the caller's work without the word COMMIT.
CREATE OR REPLACE PROCEDURE np_ddl()
BEGIN CREATE TABLE IF NOT EXISTS np_tmp (a INT); DROP TABLE np_tmp; END
//
-- Leaves a transaction open, even under autocommit; closing the connection loses the row.
CREATE OR REPLACE PROCEDURE np_open_tx(IN w VARCHAR(64))
BEGIN START TRANSACTION; INSERT INTO np_log(who, val) VALUES (w, 1); END
//
-- n rows of a hundred bytes, then a second set: for memory, and for leaving early.
CREATE OR REPLACE PROCEDURE np_rows(IN n INT)
BEGIN SELECT seq AS id, REPEAT('x', 100) AS pad FROM seq_1_to_1000000 LIMIT n; SELECT n AS total; END
//
-- Takes a pause between its result sets: for time limits and KILL.
CREATE OR REPLACE PROCEDURE np_sleep(IN s DOUBLE)
BEGIN SELECT 'go' AS a; SELECT SLEEP(s) AS slept; SELECT 'end' AS z; END
//
-- Calls other procedures: their result sets reach the caller, their OUT values stay here.
CREATE OR REPLACE PROCEDURE np_nested(OUT total INT)
BEGIN
  DECLARE x INT;
  CALL np_out(x, @ignored);
  SELECT x AS outer_rs;
  CALL np_n_sets(2);
  SET total = x + 1;
END
//
-- Counts the rows of a table whose name is an argument.
CREATE OR REPLACE PROCEDURE np_dynamic(IN tbl VARCHAR(64), OUT n BIGINT)
BEGIN
  EXECUTE IMMEDIATE CONCAT('SELECT COUNT(*) INTO @np_n FROM `', REPLACE(tbl, '`', '``'), '`');
  SET n = @np_n;
END
//
-- Changes the session: the time zone, a user variable, a temporary table, and a flag in the
-- connection's status that makes drivers escape strings the wrong way from then on.
CREATE OR REPLACE PROCEDURE np_session()
BEGIN
  SET SESSION sql_mode = 'ANSI_QUOTES,NO_BACKSLASH_ESCAPES';
  SET SESSION time_zone = '+05:00';
  SET @np_leak = 1;
  CREATE TEMPORARY TABLE IF NOT EXISTS np_session_tmp (a INT);
END
//
-- Takes a named lock, which no ROLLBACK frees.
CREATE OR REPLACE PROCEDURE np_getlock(OUT got INT)
SET got = GET_LOCK('np', 0)
//
-- Names with a space, a backquote, a dot and letters beyond ASCII. 1 gives 2.
CREATE OR REPLACE PROCEDURE `np we``ird.näme`(IN `sel``ect` INT, OUT `ö ut` INT)
SET `ö ut` = `sel``ect` + 1
//
-- A name as long as names may be, 64 characters. Gives 64.
CREATE OR REPLACE PROCEDURE `np_0123456789012345678901234567890123456789012345678901234567890`(
  OUT a INT)
SET a = 64
//
-- A name that a driver must not take for a format string.
CREATE OR REPLACE PROCEDURE `np%s%(x)s`(INOUT a VARCHAR(50))
SET a = CONCAT(a, '%s')
//
-- An OUT value of n characters; more than max_allowed_packet gives 1301.
CREATE OR REPLACE PROCEDURE np_long_out(IN n INT, OUT t LONGTEXT)
SET t = REPEAT('x', n)
//
-- Parameters named like columns. (NULL, NULL) gives -1 and 'was null'.
CREATE OR REPLACE PROCEDURE np_shadow(INOUT id INT, INOUT who VARCHAR(64))
BEGIN SET id = IFNULL(id, -1); SET who = IFNULL(who, 'was null'); END
//
-- One row into OUT. None is a warning (1329) and leaves NULL, several are an error (1172).
CREATE OR REPLACE PROCEDURE np_into(IN n INT, OUT v INT)
SELECT seq INTO v FROM seq_1_to_10 WHERE seq <= n
//
-- Writes with its creator's rights: under autocommit even on a replica that is read_only, which
-- has then diverged. In a transaction it is the COMMIT that fails, with 1290.
CREATE OR REPLACE PROCEDURE np_definer_write(IN w VARCHAR(64)) SQL SECURITY DEFINER
INSERT INTO np_log(who, val) VALUES (w, 31)
//
-- Writes with its caller's rights: 1290 for a plain user on a replica.
CREATE OR REPLACE PROCEDURE np_invoker_write(IN w VARCHAR(64)) SQL SECURITY INVOKER
INSERT INTO np_log(who, val) VALUES (w, 32)
//
-- Says that it reads, and writes: nobody checks the promise.
CREATE OR REPLACE PROCEDURE np_liar(IN w VARCHAR(64)) READS SQL DATA
BEGIN INSERT INTO np_log(who, val) VALUES (w, 33); SELECT 1; END
//
-- A function: CALL must not find it (1305).
CREATE OR REPLACE FUNCTION np_func(a INT) RETURNS INT DETERMINISTIC
RETURN a + 1
//
-- Eleven parameters, the modes mixed: for those who count positions.
CREATE OR REPLACE PROCEDURE np_many(
  IN a1 INT, OUT a2 INT, IN a3 INT, OUT a4 INT, INOUT a5 INT, IN a6 INT, OUT a7 INT, IN a8 INT,
  OUT a9 INT, INOUT a10 INT, OUT a11 INT)
BEGIN
  SET a2 = a1, a4 = a3, a5 = a5 + 1, a7 = a6, a9 = a8, a10 = -a10, a11 = 11;
  SELECT a1, a3, a6, a8;
END
//
